"""Sessions of agents that take turns over one growing context: drawn from stated distributions by seed, or read from a trace.

    react       think, act, observe, and again: a planner and a caller in turn, each act followed by a tool's observation
    reflexion   act, evaluate, reflect, and try again, until the result is good enough or the trials are used up
    unbalanced  ReAct whose next agent is drawn, the first ones far more often (Zipf)
    low-sharing one turn per session: no context is ever shared
Arrivals (open loop) are a Poisson process, or bursts of one. Lengths are lognormal, cut to a range: they have long tails, as in
agents' sessions.

A trace is JSON lines, one per session: {"arrival_s", "context_tokens", "turns": [{"agent", "given_tokens", "answer_tokens",
"pause_s"}]}; `pause_s`: from the end of the turn before (a tool's time).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prefillshare.kvshare.errors import ConfigError


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution of tokens or seconds: this median, this sigma of the logarithm, between `low` and `high`."""

    median: float
    sigma: float
    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return min(self.high, max(self.low, rng.lognormvariate(math.log(self.median), self.sigma)))

    def tokens(self, rng: random.Random) -> int:
        return max(1, round(self.draw(rng)))


@dataclass(frozen=True)
class Scale:
    """Distributions from which sessions are drawn. `context`: system prompt, tools and task, before the first turn. `steps`:
    range of think-act-observe steps. `trials`: most trials of Reflexion. `success`: probability that one is good enough."""

    context: Lengths = Lengths(1024, 0.3, 512, 1400)
    thought: Lengths = Lengths(10, 0.4, 4, 24)
    call: Lengths = Lengths(6, 0.4, 3, 16)
    observation: Lengths = Lengths(64, 0.7, 8, 256)
    tool_s: Lengths = Lengths(0.05, 0.5, 0.0, 0.5)
    steps: tuple[int, int] = (3, 5)
    trials: int = 3
    success: float = 0.5
    longest: int = 2048

    @classmethod
    def named(cls, name: str) -> Scale:
        """The scale called `name`. Raises ConfigError."""
        if name not in SCALES:
            raise ConfigError(f"unknown scale {name!r}", field="--scale", fix=f"use one of {', '.join(SCALES)}")
        return SCALES[name]


@dataclass(frozen=True)
class Turn:
    """`agent`: number of the model. `given_tokens`: length of the new input. `answer_tokens`: length of what it generates."""

    agent: int
    given_tokens: int
    answer_tokens: int
    pause_s: float = 0.0


@dataclass(frozen=True)
class Session:
    number: int
    context_tokens: int
    turns: tuple[Turn, ...]
    arrival_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the context at the session's end."""
        return self.context_tokens + sum(turn.given_tokens + turn.answer_tokens for turn in self.turns)

    def given(self, vocabulary: int, seed: int | str) -> tuple[list[int], list[list[int]]]:
        """Token ids of the context and of each turn's input: the same for every system."""
        rng = random.Random(f"text {seed} {self.number}")
        draw = lambda count: [rng.randrange(vocabulary) for _ in range(count)]  # noqa: E731
        return draw(self.context_tokens), [draw(turn.given_tokens) for turn in self.turns]


SCALES = {
    #: For two cores and a small model. On a CPU every further request makes a decode step more expensive, on a GPU hardly:
    #: answers are shorter relative to their contexts than in "papers", so that prefill and decoding have the same proportion.
    "small": Scale(),
    #: The papers' lengths: thousands of tokens of context, tens of turns.
    "papers": Scale(
        context=Lengths(3000, 0.3, 1000, 6000),
        thought=Lengths(120, 0.5, 16, 512),
        call=Lengths(60, 0.5, 8, 256),
        observation=Lengths(400, 0.8, 16, 2000),
        tool_s=Lengths(0.3, 0.6, 0.0, 3.0),
        steps=(4, 8),
        longest=16384,
    ),
}

#: The rate between bursts, as a share of the rate in a burst.
BETWEEN = 0.05

Draw = Callable[[random.Random, int, Scale], Sequence[Turn]]


def _steps(rng: random.Random, scale: Scale, agent: Callable[[], int], first: int) -> list[Turn]:
    """Turns that think and act; each act's observation is the next thought's input. `first`: input tokens of the first."""
    turns, given, pause = [], first, 0.0
    for _ in range(rng.randint(*scale.steps)):
        turns.append(Turn(agent(), given, scale.thought.tokens(rng), pause))
        turns.append(Turn(agent(), 1, scale.call.tokens(rng)))
        given, pause = scale.observation.tokens(rng), scale.tool_s.draw(rng)
    return turns


def _round(agents: int, start: int) -> Callable[[], int]:
    taken = iter(range(start, 1 << 30))
    return lambda: next(taken) % agents


def react(rng: random.Random, agents: int, scale: Scale) -> list[Turn]:
    return _steps(rng, scale, _round(agents, rng.randrange(agents)), scale.observation.tokens(rng))


def reflexion(rng: random.Random, agents: int, scale: Scale) -> list[Turn]:
    """Trials of `react`; after each an evaluator says whether it is good enough, and if not a third agent reflects."""
    turns, agent = [], _round(agents, rng.randrange(agents))
    for _ in range(scale.trials):
        turns += _steps(rng, scale, agent, scale.observation.tokens(rng))
        turns.append(Turn(agent(), 1, scale.call.tokens(rng)))
        if rng.random() < scale.success:
            break
        turns.append(Turn(agent(), 1, scale.thought.tokens(rng)))
    return turns


def unbalanced(rng: random.Random, agents: int, scale: Scale) -> list[Turn]:
    weights = [1 / (1 + agent) for agent in range(agents)]
    return _steps(rng, scale, lambda: rng.choices(range(agents), weights)[0], scale.observation.tokens(rng))


def low_sharing(rng: random.Random, agents: int, scale: Scale) -> list[Turn]:
    return [Turn(rng.randrange(agents), scale.observation.tokens(rng), scale.thought.tokens(rng))]


PATTERNS: dict[str, Draw] = {"react": react, "reflexion": reflexion, "unbalanced": unbalanced, "low-sharing": low_sharing}


def sessions(pattern: str, count: int, agents: int, seed: int, scale: Scale) -> list[Session]:
    """Drawn sessions, none longer than `scale.longest`: turns beyond that are left out. Raises ConfigError for an unknown
    pattern."""
    if pattern not in PATTERNS:
        raise ConfigError(f"unknown pattern {pattern!r}", field="--pattern", fix=f"use one of {', '.join(PATTERNS)}")
    drawn = []
    for number in range(count):
        rng = random.Random(f"{pattern} {seed} {number}")
        session = Session(number, scale.context.tokens(rng), tuple(PATTERNS[pattern](rng, agents, scale)))
        while session.tokens > scale.longest and len(session.turns) > 1:
            session = replace(session, turns=session.turns[:-1])
        drawn.append(session)
    return drawn


def poisson(of: Iterable[Session], per_s: float, seed: int) -> list[Session]:
    """The same sessions, with arrivals of a Poisson process of `per_s` sessions a second on average."""
    rng, now, arriving = random.Random(f"arrivals {seed}"), 0.0, []
    for session in of:
        now += rng.expovariate(per_s)
        arriving.append(replace(session, arrival_s=now))
    return arriving


def bursts(of: Iterable[Session], per_s: float, seed: int, factor: float = 4.0, period_s: float = 30.0) -> list[Session]:
    """The same sessions, with arrivals of a Poisson process whose mean rate is `per_s`. In the first `1 / factor` of every
    period the rate is almost `factor` times as high, and almost zero in the rest."""
    rng, now, arriving = random.Random(f"bursts {seed}"), 0.0, []
    highest = per_s * factor / (1 + BETWEEN * (factor - 1))
    for session in of:
        while True:  # thinning: draw at the highest rate, keep what the present rate allows
            now += rng.expovariate(highest)
            if now % period_s < period_s / factor or rng.random() < BETWEEN:
                break
        arriving.append(replace(session, arrival_s=now))
    return arriving


def write_trace(of: Iterable[Session], file: Path) -> None:
    lines = ({key: value for key, value in asdict(session).items() if key != "number"} for session in of)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_trace(file: Path, agents: int) -> list[Session]:
    """The sessions in order of arrival. Raises ConfigError naming the line that is not a session, or has an unknown agent."""
    read = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            turns = tuple(
                Turn(int(t["agent"]), int(t["given_tokens"]), int(t["answer_tokens"]), float(t.get("pause_s", 0.0)))
                for t in record["turns"]
            )
            session = Session(0, int(record["context_tokens"]), turns, float(record.get("arrival_s", 0.0)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file}, line {number}: {error!r}", fix="give a session per line, as the module says") from None
        least = min((min(turn.given_tokens, turn.answer_tokens) for turn in turns), default=0)
        if least < 1 or session.context_tokens < 1:
            raise ConfigError(f"{file}, line {number}: turns need at least one token given and one answered")
        if session.arrival_s < 0 or any(turn.pause_s < 0 for turn in turns):
            raise ConfigError(f"{file}, line {number}: a time below zero")
        if wrong := [turn.agent for turn in turns if not 0 <= turn.agent < agents]:
            raise ConfigError(f"{file}, line {number}: agent {wrong[0]} of {agents}", fix="agents are counted from 0; use more")
        read.append(session)
    read.sort(key=lambda session: session.arrival_s)
    return [replace(session, number=number) for number, session in enumerate(read)]
