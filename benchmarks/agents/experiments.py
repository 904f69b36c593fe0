"""What is played against every system: workloads and loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.agents.workload import Scale, Session, bursts, poisson, read_trace, sessions


@dataclass(frozen=True)
class Experiment:
    """`at_once`: sessions under way (closed loop); or `per_s`: arriving sessions per second, in bursts or not (open loop).
    `trace`: a file whose sessions are played instead of drawn ones."""

    pattern: str
    agents: int
    sessions: int
    at_once: int | None = None
    per_s: float | None = None
    bursty: bool = False
    trace: Path | None = None

    @property
    def name(self) -> str:
        load = f"{self.at_once} at once" if self.at_once else "as recorded"
        if self.per_s:
            load = f"{self.per_s:g}/s" + (" in bursts" if self.bursty else "")
        return f"{self.trace.name if self.trace else self.pattern}, {self.agents} models, {load}"

    def played(self, seed: int, scale: Scale) -> list[Session]:
        """The sessions, in order of arrival."""
        if self.trace:
            return read_trace(self.trace, self.agents)
        drawn = sessions(self.pattern, self.sessions, self.agents, seed, scale)
        if not self.per_s:
            return drawn
        return (bursts if self.bursty else poisson)(drawn, self.per_s, seed)


#: ReAct is played at these loads with MODELS models; at the highest load with OTHER_MODELS, too.
LOADS, MODELS, OTHER_MODELS = (2, 4, 6), 4, (2, 8)


def full(count: int) -> list[Experiment]:
    """The experiments of the full form. `count`: sessions of the larger ones."""
    half = max(3, count // 2)
    return [
        *(Experiment("react", MODELS, max(half, load), at_once=load) for load in LOADS),
        *(Experiment("react", models, count, at_once=LOADS[-1]) for models in OTHER_MODELS),
        Experiment("unbalanced", MODELS, half, per_s=0.1, bursty=True),
        Experiment("low-sharing", MODELS, 2 * count, at_once=count),
        Experiment("reflexion", MODELS, half, at_once=half),
    ]


def short(count: int) -> list[Experiment]:
    return [
        Experiment("react", MODELS, count, at_once=count),
        Experiment("low-sharing", MODELS, count, at_once=count),
    ]


def decider(count: int) -> list[Experiment]:
    """Those in which ways to decide who makes a prompt's KV are compared: few and many sessions, and nothing shared."""
    return [
        *(Experiment("react", MODELS, count, at_once=load) for load in (LOADS[0], LOADS[-1])),
        Experiment("low-sharing", MODELS, count, at_once=LOADS[-1]),
    ]


#: Sessions that arrive a second: more than one engine of stock vLLM serves with 4 models or with 8, whose contexts its caches
#: do not hold then, and fewer than one engine with shared KV serves.
COLLAPSE_PER_S = 0.15


def few_models(count: int) -> list[Experiment]:
    """Those in which there is least to gain from sharing."""
    return [Experiment("react", models, count, at_once=LOADS[-1]) for models in (1, OTHER_MODELS[0])]


def one_engine(count: int) -> list[Experiment]:
    """Those in which one engine of ours is compared with one of stock vLLM."""
    return [
        *(Experiment("react", models, count, at_once=LOADS[-1]) for models in sorted((1, *OTHER_MODELS, MODELS))),
        Experiment("low-sharing", MODELS, 2 * count, at_once=LOADS[-1]),
        *(Experiment("react", models, 2 * count, per_s=COLLAPSE_PER_S) for models in (MODELS, OTHER_MODELS[-1])),
    ]
