"""Decides where the base's KV that a turn lacks comes from: the decode engine makes it itself ("here"), the prefill pool makes
it ("there"), or another decode engine that has it hands it over ("copy").

Decode engines that hold the base can do the first and the last. What counts is the time to the turn's first token, and the
delay of the responses that run on decode replicas meanwhile:
 1. The decode replica is placed first. If it lacks less than a block, it computes that itself: a handoff is never worth it.
 2. Costs here: the tokens that wait there and those that the turn lacks, at the pool's measured rate, and the turn's part once
    more for each response that runs there, because each of them waits.
 3. Costs there: the tokens that wait at the prefill replica and those that the turn lacks there, at that pool's measured rate;
    the measured cost of a handoff; and reading all that the decode replica lacks.
 4. Costs of a copy, from the decode replica of any pool that holds most of the prefix: as in 2 for what that replica lacks,
    and a handoff and a read as in 3.
 5. The lowest costs win. A rate that has not been measured counts as 0, so that it gets measured. The pool's last decision
    stands unless another one is better by HYSTERESIS.
 6. A prompt that would make a step take longer than the pool's inter_token_objective_s, while responses run there, goes to the
    prefill pool. If each prefill replica is ejected or has failed this turn, the decode engine makes everything.

llm-d's router makes the first choice for a single model, and calls this part a decider.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from prefillshare.router.clock import now
from prefillshare.router.pools.pool import Placed, Pool
from prefillshare.router.service_rate import MeanRatio
from prefillshare.router.turn.place import decode_place, prefill_place

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn

#: Factor by which another decision must be better than the pool's last one.
HYSTERESIS = 1.1
#: Tokens that an engine computes in one step unless max_num_batched_tokens is set (vLLM's default for a server).
STEP_TOKENS = 2048


class Where(StrEnum):
    """Where the missing KV comes from, as metrics and usage show it."""

    HERE = "here"
    THERE = "there"
    COPY = "copy"


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
    """`pool`, `placed`: the replica that makes the KV or hands it over. `decode`: the decode replica, if it is decided, too."""

    where: Where
    why: Why
    pool: Pool
    placed: Placed
    decode: Placed | None = None

    @property
    def source(self) -> str:
        """The replica from which KV is read; "" if it is made where it is used."""
        return "" if self.where is Where.HERE else self.placed.replica.id


class Costs:
    """Recent costs of one decode pool. `here_s`: seconds per token computed in its engines. `read_s`: seconds per token that
    they read. `handoff_s`: seconds per handoff, without computing and reading."""

    def __init__(self, clock: Callable[[], float]):
        self.here_s, self.read_s, self.handoff_s = (MeanRatio(clock) for _ in range(3))
        self.last: Where | None = None

    def made_here(self, seconds: float, tokens: int, block_size: int) -> None:
        """Seconds from the decode call to the first token. Less than a block shows the cost of a step, not of its tokens."""
        if tokens >= block_size:
            self.here_s.add(seconds, tokens)

    def handed_over(self, seconds: float, read_s: float, tokens: int) -> None:
        """`seconds`: of the handoff, without computing and without the read of `tokens`, which took `read_s`."""
        self.handoff_s.add(max(0.0, seconds), 1)
        if tokens > 0 and read_s > 0:
            self.read_s.add(read_s, tokens)

    def to_make(self, placed: Placed) -> float:
        """Of what is missing on a replica of this pool."""
        replica, missing = placed.replica, placed.missing_tokens
        return (replica.total_queued_tokens + missing * (1 + replica.total_active)) * (self.here_s.value or 0.0)

    def to_read(self, tokens: int) -> float:
        return (self.handoff_s.value or 0.0) + tokens * (self.read_s.value or 0.0)


class Decider:
    def __init__(self, clock: Callable[[], float] = now):
        #: By decode pool.
        self.costs: dict[str, Costs] = defaultdict(lambda: Costs(clock))

    async def choose(self, turn: Turn) -> Choice:
        """For a turn with a shared prefix. Raises as Pool.choose does."""
        pool, policy = turn.route.prefill, turn.decoder.local_prefill
        may_ask = pool is not None and pool.replicas.any_well(turn.avoid)
        if policy is None or (policy == "never" and may_ask):
            why = Why.ONLY if policy is None else Why.POLICY
            return Choice(Where.THERE, why, pool, await prefill_place(turn))
        decode = await decode_place(turn)

        def here(why: Why) -> Choice:
            return Choice(Where.HERE, why, turn.route.decode, decode, decode)

        if policy == "always":
            return here(Why.POLICY)
        if policy == "never":
            return here(Why.UNAVAILABLE if pool else Why.ONLY)
        if decode.missing_tokens < turn.services.block_size:
            return here(Why.CACHED)
        ways = [here(Why.SOONER)]
        if copy := self._copy(turn, decode):
            ways.append(copy)
        if may_ask:
            there = Choice(Where.THERE, Why.SOONER, pool, await prefill_place(turn))
            if self._would_hold_up(turn, decode):
                return replace(there, why=Why.OBJECTIVE)
            ways.append(there)
        if len(ways) == 1:
            return here(Why.UNAVAILABLE if pool else Why.ONLY)
        costs = self.costs[turn.decoder.pool]
        chosen = min(ways, key=lambda way: self._cost(turn, decode, way) / (HYSTERESIS if way.where is costs.last else 1.0))
        costs.last = chosen.where
        return chosen

    def _copy(self, turn: Turn, decode: Placed) -> Choice | None:
        """The replica of any pool that holds most of the prefix, if it holds a block more than the decode replica."""
        prefix, without = turn.prefix, {*turn.avoid, decode.replica.id}
        found = [
            Choice(Where.COPY, Why.SOONER, pool, placed, decode)
            for pool in turn.route.holders
            if (placed := pool.most_cached(len(prefix.token_ids), prefix.keys, without))
            and placed.cached_tokens >= decode.cached_tokens + turn.services.block_size
        ]
        return max(found, key=lambda way: way.placed.cached_tokens, default=None)

    def _cost(self, turn: Turn, decode: Placed, way: Choice) -> float:
        costs = self.costs[turn.decoder.pool]
        if way.where is Where.HERE:
            return costs.to_make(decode)
        read_s = costs.to_read(decode.missing_tokens)
        if way.where is Where.COPY:
            return self.costs[way.pool.name].to_make(way.placed) + read_s
        waits = way.placed.replica.total_queued_tokens + way.placed.missing_tokens
        return waits * (turn.services.compute_s.value or 0.0) + read_s

    def _would_hold_up(self, turn: Turn, decode: Placed) -> bool:
        objective, rate = turn.decoder.inter_token_objective_s, self.costs[turn.decoder.pool].here_s.value
        if objective is None or rate is None or not decode.replica.total_active:
            return False
        return min(decode.missing_tokens, turn.decoder.step_tokens or STEP_TOKENS) * rate > objective
