"""One system of benchmarks.overhead in a process of its own: start, warm up, measure, stop.

    python -m benchmarks.overhead.measure SYSTEM PLAN_AS_JSON

Events go to stdout as JSON, one a line; everything the system itself prints goes to stderr.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.overhead.systems import SYSTEMS, Started
from benchmarks.shared import load
from benchmarks.shared.environment import CpuUse


@dataclass(frozen=True)
class Plan:
    """What is measured. `turns`: fewest turns of one measurement; high concurrency needs more."""

    model: str
    concurrency: tuple[int, ...]
    turns: int
    prompt_tokens: int
    output_tokens: int
    repeats: int
    seed: int = 20

    def turns_at(self, concurrency: int) -> int:
        return max(self.turns, concurrency)

    def as_json(self) -> str:
        return json.dumps(asdict(self))


async def measure(system: str, plan: Plan, emit) -> None:
    vocab_size = json.loads((Path(plan.model) / "config.json").read_text())["vocab_size"]

    def prompts(count: int, tokens: int, *where: object) -> list[list[int]]:
        return load.prompts(count, tokens, vocab_size, plan.seed, *where)

    began = time.monotonic()
    emit(event="stage", text="starting")
    async with SYSTEMS[system](plan.model) as started:
        emit(event="started", start_s=time.monotonic() - began)
        try:
            for surface_name, surface in started.surfaces.items():
                for concurrency in plan.concurrency:
                    emit(event="stage", text=f"warming up: {surface_name}, {concurrency} at a time")
                    await _warm_up(surface, plan, concurrency, prompts, surface_name)
            for repeat in range(plan.repeats):
                for concurrency in plan.concurrency:
                    for number, (name, surface) in enumerate(started.surfaces.items()):
                        emit(event="stage", text=f"{name}, {concurrency} at a time, repeat {repeat + 1} of {plan.repeats}")
                        # A system's second surface gets other prompts, since those of the first are cached by now.
                        asked = prompts(plan.turns_at(concurrency), plan.prompt_tokens, repeat, concurrency, number)
                        emit(event="figures", surface=name, concurrency=concurrency,
                             **await _one(started, surface, asked, concurrency, plan.output_tokens))
        finally:
            for surface in started.surfaces.values():
                await surface.close()
        emit(event="stage", text="stopping")
    emit(event="done")


async def _warm_up(surface: load.Surface, plan: Plan, concurrency: int, prompts, name: str) -> None:
    """Warm up connections, caches of kernels and NIXL's handshake: two full turns, then a wave of shorter ones."""
    if concurrency == min(plan.concurrency):
        await load.run(surface, prompts(2, plan.prompt_tokens, "warm", name), 1, plan.output_tokens)
    short = prompts(concurrency, max(plan.prompt_tokens // 4, 2), "warm", name, concurrency)
    await load.run(surface, short, concurrency, plan.output_tokens)


async def _one(started: Started, surface: load.Surface, asked, concurrency: int, output_tokens: int) -> dict[str, object]:
    use = CpuUse(started.roles)
    samples = await load.run(surface, asked, concurrency, output_tokens)
    cpu_s = {role: seconds / len(samples) for role, seconds in use.seconds().items()}
    return {"figures": load.figures(samples), "cpu_s_per_turn": cpu_s}


async def _until_told(work) -> None:
    """Run `work`; SIGTERM cancels it, so that the system is stopped on the way out."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    await work


def main() -> None:
    system, plan = sys.argv[1], Plan(**json.loads(sys.argv[2]))
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(**event) -> None:
        events.write(json.dumps(event) + "\n")

    asyncio.run(_until_told(measure(system, plan, emit)))


if __name__ == "__main__":
    main()
