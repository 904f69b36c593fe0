"""Figures from records of turns: latency, throughput, goodput, hit ratio. They have 95 % intervals over sessions; rates have
the range over repeats."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.agents.driver import TurnRecord
from benchmarks.shared.load import quantile

#: Resamples of the sessions for an interval (bootstrap).
RESAMPLES = 200
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Objective:
    """A session is good if no turn failed, every turn's first token came within `ttft_s`, and the mean time between its other
    tokens was at most `inter_token_s`."""

    ttft_s: float
    inter_token_s: float

    def holds(self, turns: Sequence[TurnRecord]) -> bool:
        return all(not t.error and t.ttft_s <= self.ttft_s and _mean(t.inter_token_s) <= self.inter_token_s for t in turns)


def summary(repeats: Sequence[Sequence[TurnRecord]], objective: Objective, seed: int = 0, resamples: int = RESAMPLES) -> dict:
    """Figures of all of an experiment's repeats: figure -> {"value", "low", "high"}, None if no turn tells anything about it;
    counts are plain numbers. `seconds`: the sum over repeats of the time from the first turn asked to the last one ended. There
    are no intervals without `resamples`, nor for rates with a single repeat."""
    records = [record for of in repeats for record in of]
    sessions = [session for of in repeats for session in _by_session(of)]
    spans = [max(r.end_s for r in of) - min(r.asked_s for r in of) for of in repeats]
    rng = random.Random(seed)
    resampled = [rng.choices(sessions, k=len(sessions)) for _ in range(resamples)]
    found = {name: _with_interval(figure, sessions, resampled) for name, figure in _figures().items()}
    # A rate's time is that of all sessions together: resampling sessions does not show how it varies.
    for name, count in _counts(objective).items():
        rates = [count(_by_session(of)) / span for of, span in zip(repeats, spans, strict=True)]
        low, high = (round(f(rates), 5) if len(rates) > 1 else None for f in (min, max))
        found[f"{name}_per_s"] = {"value": round(count(sessions) / sum(spans), 5), "low": low, "high": high}
    return found | {
        "sessions": len(sessions),
        "turns": len(records),
        "failed_turns": sum(bool(record.error) for record in records),
        "resumes": sum(record.cost.resumes for record in records),
        "seconds": round(sum(spans), 3),
    }


def share_good(records: Sequence[TurnRecord], objective: Objective) -> float:
    """Share of good sessions."""
    sessions = _by_session(records)
    return sum(map(objective.holds, sessions)) / len(sessions)


Sessions = Sequence[Sequence[TurnRecord]]


def _by_session(records: Sequence[TurnRecord]) -> list[list[TurnRecord]]:
    found: dict[int, list[TurnRecord]] = defaultdict(list)
    for record in records:
        found[record.session].append(record)
    return list(found.values())


def _turns(sessions: Sessions) -> list[TurnRecord]:
    """The turns that did not fail."""
    return [turn for session in sessions for turn in session if not turn.error]


def _counts(objective: Objective) -> dict[str, Callable[[Sessions], int]]:
    return {
        "turns": lambda sessions: len(_turns(sessions)),
        "tokens": lambda sessions: sum(len(turn.token_s) for turn in _turns(sessions)),
        "good_sessions": lambda sessions: sum(map(objective.holds, sessions)),
    }


def _figures() -> dict[str, Callable[[Sessions], float]]:
    def session_s(session: Sequence[TurnRecord]) -> float:
        """Seconds of a session, without the tools' time between turns."""
        return sum(turn.latency_s for turn in session)

    def hit_ratio(sessions: Sessions) -> float:
        cached = sum(turn.cost.cached_tokens for turn in _turns(sessions))
        return cached / max(1, cached + sum(turn.cost.computed_tokens for turn in _turns(sessions)))

    values: dict[str, Callable[[Sessions], list[float]]] = {
        "session_s": lambda sessions: [session_s(session) for session in sessions if not session[-1].error],
        "turn_s": lambda sessions: [turn.latency_s for turn in _turns(sessions)],
        "ttft_s": lambda sessions: [turn.ttft_s for turn in _turns(sessions)],
        "inter_token_s": lambda sessions: [gap for turn in _turns(sessions) for gap in turn.inter_token_s],
    }
    figures: dict[str, Callable[[Sessions], float]] = {
        f"{name}_{quantile_name}": lambda sessions, of=of, at=at: quantile(of(sessions), at) if of(sessions) else float("nan")
        for name, of in values.items()
        for quantile_name, at in QUANTILES.items()
    }
    return figures | {
        "hit_ratio": hit_ratio,
        "computed_tokens_per_turn": lambda sessions: _mean([turn.cost.computed_tokens for turn in _turns(sessions)]),
        "prefill_s_mean": lambda sessions: _mean([turn.cost.prefill_s for turn in _turns(sessions)]),
        "ttft_s_mean": lambda sessions: _mean([turn.ttft_s for turn in _turns(sessions)]),
        "turn_s_mean": lambda sessions: _mean([turn.latency_s for turn in _turns(sessions)]),
        "kv_bytes_per_turn": lambda sessions: _mean([turn.cost.kv_bytes for turn in _turns(sessions)]),
    }


def _with_interval(figure: Callable[[Sessions], float], sessions: Sessions, resampled: Sequence[Sessions]) -> dict:
    drawn = sorted(value for sample in resampled if not math.isnan(value := figure(sample)))
    if math.isnan(figure(sessions)):
        return dict.fromkeys(("value", "low", "high"))
    low, high = (round(drawn[int(at * len(drawn))], 5) if drawn else None for at in (0.025, 0.975))
    return {"value": round(figure(sessions), 5), "low": low, "high": high}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
