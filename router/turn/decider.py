"""Decides who makes the base's KV that a turn lacks: the prefill pool ("there"), or the decode engine itself ("here").

Only decode engines that hold the base can do it. What counts is the time to the turn's first token, and the delay of the
responses that run on the decode replica meanwhile:
 1. The decode replica is placed first. If it lacks less than a block, it computes that itself: a handoff is never worth it.
 2. Costs here: the tokens that wait there and those that the turn lacks, at the pool's measured rate, and the turn's part once
    more for each response that runs there, because each of them waits.
 3. Costs there: the tokens that wait at the prefill replica and those that the turn lacks there, at that pool's measured rate;
    the measured cost of a handoff; and reading all that the decode replica lacks.
 4. The lower costs win. A rate that has not been measured counts as 0, so that it gets measured. The pool's last decision
    stands unless the other one is better by HYSTERESIS.
 5. A prompt that would make a step take longer than the pool's inter_token_objective_s, while responses run there, goes to the
    prefill pool. If no prefill replica can get work, everything is made here.

llm-d's router makes the same choice for a single model, and calls this part a decider.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from prefillshare.router.clock import now
from prefillshare.router.pools.pool import Placed
from prefillshare.router.service_rate import MeanRatio
from prefillshare.router.turn.place import decode_place, prefill_place

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn

#: Factor by which the other decision must be better than the pool's last one.
HYSTERESIS = 1.1
#: Tokens that an engine computes in one step unless max_num_batched_tokens is set (vLLM's default for a server).
STEP_TOKENS = 2048


class Why(StrEnum):
    """Reasons of a decision, as metrics and usage show them."""

    ONLY = "only"  # there is no other way
    POLICY = "policy"
    CACHED = "cached"
    SOONER = "sooner"
    OBJECTIVE = "objective"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True)
class Choice:
    """`placed`: the replica that makes the KV, a decode replica if `is_here`, else a prefill replica."""

    is_here: bool
    why: Why
    placed: Placed


class Costs:
    """Recent costs of both ways, for one decode pool. `here_s`: seconds per token computed in the decode engine. `read_s`:
    seconds per token read. `handoff_s`: seconds per handoff, without computing and reading."""

    def __init__(self, clock: Callable[[], float]):
        self.here_s, self.read_s, self.handoff_s = (MeanRatio(clock) for _ in range(3))
        self.was_here: bool | None = None

    def made_here(self, seconds: float, tokens: int, block_size: int) -> None:
        """Seconds from the decode call to the first token. Less than a block shows the cost of a step, not of its tokens."""
        if tokens >= block_size:
            self.here_s.add(seconds, tokens)

    def handed_over(self, seconds: float, read_s: float, tokens: int) -> None:
        """`seconds`: of the handoff, without computing and without the read of `tokens`, which took `read_s`."""
        self.handoff_s.add(max(0.0, seconds), 1)
        if tokens > 0 and read_s > 0:
            self.read_s.add(read_s, tokens)

    def here(self, placed: Placed) -> float:
        replica, missing = placed.replica, placed.missing_tokens
        rate = self.here_s.value or 0.0
        return (replica.total_queued_tokens + missing * (1 + replica.total_active)) * rate

    def there(self, placed: Placed, to_read: int, compute_s: float | None) -> float:
        waits = placed.replica.total_queued_tokens + placed.missing_tokens
        return waits * (compute_s or 0.0) + (self.handoff_s.value or 0.0) + to_read * (self.read_s.value or 0.0)


class Decider:
    def __init__(self, clock: Callable[[], float] = now):
        #: By decode pool.
        self.costs: dict[str, Costs] = defaultdict(lambda: Costs(clock))

    async def choose(self, turn: Turn) -> Choice:
        """For a turn with a shared prefix. Raises as Pool.choose does."""
        pool, policy = turn.route.prefill, turn.decoder.local_prefill
        if policy is None:
            return Choice(False, Why.ONLY, await prefill_place(turn))
        if policy == "never" and pool and pool.replicas.usable():
            return Choice(False, Why.POLICY, await prefill_place(turn))
        here = await decode_place(turn)
        if pool is None:
            return Choice(True, Why.ONLY, here)
        if policy == "always":
            return Choice(True, Why.POLICY, here)
        if not pool.replicas.usable():
            return Choice(True, Why.UNAVAILABLE, here)
        if here.missing_tokens < turn.services.block_size:
            return Choice(True, Why.CACHED, here)
        costs, there = self.costs[turn.decoder.pool], await prefill_place(turn)
        if self._would_hold_up(turn, here, costs):
            return Choice(False, Why.OBJECTIVE, there)
        here_s = costs.here(here)
        there_s = costs.there(there, here.missing_tokens, turn.services.compute_s.value)
        costs.was_here = here_s <= there_s * (HYSTERESIS if costs.was_here else 1 / HYSTERESIS)
        return Choice(costs.was_here, Why.SOONER, here if costs.was_here else there)

    def _would_hold_up(self, turn: Turn, here: Placed, costs: Costs) -> bool:
        objective, rate = turn.decoder.inter_token_objective_s, costs.here_s.value
        if objective is None or rate is None or not here.replica.total_active:
            return False
        return min(here.missing_tokens, turn.decoder.step_tokens or STEP_TOKENS) * rate > objective
