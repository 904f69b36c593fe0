"""A part of a campaign: so many turns under faults, and then the accounts when all is quiet."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.soak.agent import Agent, run_all
from benchmarks.soak.findings import Findings
from benchmarks.soak.storm import Storm
from benchmarks.soak.system import System
from benchmarks.soak.truth import Truth
from benchmarks.soak.watching import Sample, Watch, look

CLIENTS = 8
#: Seconds that a turn may take on the average before a leg is given up, and that the system may take to be whole again.
TURN_S, CALM_S = 20.0, 240.0
#: Seconds within which nothing may be held any more: a lease, and what replicas tell of themselves.
QUIET_S = 60.0


def run(
    system: System,
    truth: Truth,
    seed: str,
    turns: int,
    before: int,
    tell: Callable[..., None],
    cut: Callable[[float], None] | None,
    disk: Path | None,
) -> tuple[Findings, list[Sample]]:
    """`seed`: of this leg alone. `before`: turns of earlier legs. `tell(**event)`: to the process that started this one.
    `cut`, `disk`: as of Storm."""
    found, rng, began = Findings(), random.Random(seed), time.monotonic()

    def more() -> bool:
        tell(turns=before + found.turns)
        return found.turns < turns

    agents = [Agent(number, random.Random(rng.random()), system, truth, found, more) for number in range(CLIENTS)]
    storm = Storm(system, random.Random(rng.random()), found, lambda text: tell(told=text), cut, disk)
    with Watch(lambda: before + found.turns) as watch:
        with storm:
            for number in run_all(agents, TURN_S * turns):
                found.tell("hung", f"client {number} has not ended")
        if not storm.calm(CALM_S):
            found.tell("hung", f"the system is not whole {CALM_S:g} s after the last fault: {storm.info()}")
        if not found.hung:
            for agent in agents:
                agent.ask_again()
                for session in list(agent.contexts):
                    agent.forget(session)
        _quiet(system, found)
        samples = watch.samples + look(before + found.turns)
    for agent in agents:
        agent.close()
    found.seconds = time.monotonic() - began
    return found, samples


def _quiet(system: System, found: Findings) -> None:
    """Nothing runs: nothing may be held."""
    deadline = time.monotonic() + QUIET_S
    while (held := _held(system)) and time.monotonic() < deadline:
        time.sleep(0.5)
    found.leaked.update(held)


def _held(system: System) -> dict[str, int]:
    held = {}
    for pool, replicas in system.handle.replica_stats.remote().result(timeout_s=60).items():
        for figures in replicas.values():
            for what in ("active", "running", "waiting", "blocks_used"):
                if figures[what]:
                    held[f"{pool}: {what}"] = held.get(f"{pool}: {what}", 0) + int(figures[what])
    return held
