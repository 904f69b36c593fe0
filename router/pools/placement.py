"""Placement: Filter -> Score in [0, 1] -> Pick. Pure functions over a snapshot of a pool's replicas.

The same three steps serve prefill and decode; what differs is what counts as load:
  prefill  tokens queued there and not computed yet; with the prompt's missing part, the work before its first token
  decode   turns that run there

Scorers (1 is best):
  work     prefill work before the first token: queued tokens and the prompt's own missing part; 1 for the replica with least.
           A replica that holds a hot prefix loses to an idle one as soon as its queue outweighs what it would save. With a
           weight on `prefix` the queue must be somewhat longer, because a second copy also takes room from other contexts.
  prefix   share of the prompt that is cached there
  balance  load relative to the least loaded replica
  session  1 for the replica of the session's last turn
  fill     1 for the replica that this router has lately filled least: if nothing else decides, contexts spread over the caches
  turn     round robin: 1 for the replica whose turn it is
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from operator import attrgetter
from typing import Protocol, TypeVar

from prefillshare.kvshare.config.placement import Placement as PlacementConfig
from prefillshare.kvshare.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica, as placement sees it."""

    replica: str
    #: Leading prompt tokens cached there.
    overlap_tokens: int = 0
    #: Load: prompt tokens queued for computation (prefill), turns running (decode).
    queued_tokens: int = 0
    active: int = 0
    #: Prompt tokens this router has had computed there, older ones counting less; only comparable with each other.
    filled_tokens: float = 0.0
    #: It has room for the turn.
    fits: bool = True


@dataclass(frozen=True, slots=True)
class Call:
    """One request to place."""

    prompt_tokens: int
    #: Replica of the session's last turn, and the next one in round robin, for the policies that look at them.
    last_replica: str | None = None
    next_replica: str | None = None


class Member(Protocol):
    """A replica of a pool. `load` orders replicas by how much they have to do."""

    id: str

    @property
    def load(self) -> object: ...


M = TypeVar("M", bound=Member)
#: In a large pool, placement looks at this many replicas that hold most of the prompt, and at as many with least load.
SHORTLIST = 8

Scorer = Callable[[Sequence[Candidate], Call], Sequence[float]]
Weights = Mapping[str, float]


def _work(candidates, call):
    ahead = [c.queued_tokens + max(0, call.prompt_tokens - c.overlap_tokens) for c in candidates]
    least = min(ahead)
    return [(least + 1) / (a + 1) for a in ahead]


def _prefix(candidates, call):
    return [min(1.0, c.overlap_tokens / max(1, call.prompt_tokens)) for c in candidates]


def _balance(candidates, call):
    load = [c.active + c.queued_tokens for c in candidates]
    least = min(load)
    return [(least + 1) / (one + 1) for one in load]


def _session(candidates, call):
    return [float(c.replica == call.last_replica) for c in candidates]


def _fill(candidates, call):
    least = min(c.filled_tokens for c in candidates)
    return [(least + 1) / (c.filled_tokens + 1) for c in candidates]


def _turn(candidates, call):
    return [float(c.replica == call.next_replica) for c in candidates]


SCORERS: Mapping[str, Scorer] = {
    "work": _work,
    "prefix": _prefix,
    "balance": _balance,
    "session": _session,
    "fill": _fill,
    "turn": _turn,
}

#: Policy -> weights for prefill and for decode. The small ones only decide between equals.
POLICIES: Mapping[str, tuple[Weights, Weights]] = {
    "prefix_aware": ({"work": 1.0, "prefix": 0.3, "fill": 0.01}, {"balance": 1.0, "prefix": 0.3}),
    "least_loaded": ({"balance": 1.0, "fill": 0.01}, {"balance": 1.0}),
    "session_sticky": ({"session": 1.0, "balance": 0.01, "fill": 0.001}, {"session": 1.0, "balance": 0.01}),
    "round_robin": ({"turn": 1.0}, {"turn": 1.0}),
}


def weights(config: PlacementConfig) -> tuple[Weights, Weights]:
    """(weights for prefill, weights for decode): those configured, else the policy's."""
    prefill, decode = POLICIES[config.policy]
    return config.prefill_weights or prefill, config.decode_weights or decode


def both(prefill: Weights, decode: Weights) -> Weights:
    """Weights for a pool whose engines do both."""
    return {name: prefill.get(name, 0.0) + decode.get(name, 0.0) for name in {**prefill, **decode}}


def with_room(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Filter: candidates with room for the turn. If none has room, all: the turn was admitted, so there will be room soon."""
    return [c for c in candidates if c.fits] or candidates


def score(candidates: Sequence[Candidate], call: Call, weights: Weights) -> list[float]:
    """Weighted mean of the scorers, in [0, 1], per candidate."""
    total = [0.0] * len(candidates)
    for name, weight in weights.items():
        for position, value in enumerate(SCORERS[name](candidates, call)):
            total[position] += weight * value
    return [value / sum(weights.values()) for value in total]


def place(candidates: Sequence[Candidate], call: Call, weights: Weights, pool: str = "the pool") -> Candidate:
    """Pick the best; among equals the first by name, so that routers agree. Raises Unavailable without candidates."""
    if not candidates:
        raise Unavailable(f"no replica of {pool} is ready", fix="try again when it has started")
    candidates = sorted(with_room(candidates), key=lambda c: c.replica)
    scores = score(candidates, call, weights)
    return candidates[max(range(len(candidates)), key=scores.__getitem__)]


def reason(chosen: Candidate, candidates: Sequence[Candidate], weights: Weights) -> str:
    """Why it was chosen, for metrics: "only" (there was no other), "policy" (the weights do not look at prefixes), "spread"
    (none holds any of the prompt), "prefix" (it holds most), "load" (another holds more, and has more to do or no room)."""
    most = max(c.overlap_tokens for c in candidates)
    if len(candidates) == 1:
        return "only"
    if not weights.keys() & {"work", "prefix"}:
        return "policy"
    if not most:
        return "spread"
    return "prefix" if chosen.overlap_tokens == most else "load"


def shortlist(
    replicas: Sequence[M], overlaps: Mapping[str, int], call: Call, fits: Callable[[str], bool]
) -> Sequence[M]:
    """The replicas to be scored; their number does not grow with the pool unless none of them has room."""
    if len(replicas) <= 2 * SHORTLIST:
        return replicas
    held = nlargest(SHORTLIST, (r for r in replicas if r.id in overlaps), key=lambda r: overlaps[r.id])
    idle = nsmallest(SHORTLIST, replicas, key=attrgetter("load"))
    named = [r for r in replicas if r.id in (call.last_replica, call.next_replica)]
    short = list({r.id: r for r in (*held, *idle, *named)}.values())
    return short if any(fits(r.id) for r in short) else replicas
