"""A closed loop of turns against one surface of a running system, and the figures from its timestamps.

Each of `concurrency` workers takes the next prompt as soon as its last turn has ended, so the system always has that many.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from statistics import fmean, median

TURN_TIMEOUT_S = 180.0


class Surface:
    """One way into a system. `prepare` and `finish` are not part of the measured time."""

    async def prepare(self, turns: int) -> None:
        """Called before `turns` turns."""

    def turn(self, prompt: list[int], output_tokens: int, details: dict[str, float]) -> AsyncIterator[int]:
        """Run a turn; yields how many new tokens arrived, whenever some do. May note server-side seconds in `details`."""
        raise NotImplementedError

    async def finish(self) -> None:
        """Called after the turns."""

    async def close(self) -> None:
        """Called once, before the system stops."""


@dataclass(frozen=True)
class Sample:
    """One turn. `arrivals`: (time, new tokens)."""

    started: float
    arrivals: list[tuple[float, int]]
    details: dict[str, float] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0][0] - self.started

    @property
    def tokens(self) -> int:
        return sum(n for _, n in self.arrivals)

    def inter_token_s(self) -> list[float]:
        """Seconds per token after the first piece; tokens that came in one piece share the time since the piece before."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [gap for (before, _), (at, n) in pairs for gap in [(at - before) / n] * n]


def prompts(count: int, tokens: int, vocab_size: int, *seed: object) -> list[list[int]]:
    """Random token ids, none from the ends of the vocabulary, where special tokens are. Equal seeds give equal prompts."""
    rng = random.Random("/".join(map(str, seed)))
    return [[rng.randrange(vocab_size // 10, vocab_size * 9 // 10) for _ in range(tokens)] for _ in range(count)]


async def run(surface: Surface, asked: Sequence[list[int]], concurrency: int, output_tokens: int) -> list[Sample]:
    """Run every prompt once. Raises RuntimeError if a turn yields another number of tokens, TimeoutError if it hangs."""
    left, samples = iter(asked), []
    await surface.prepare(len(asked))

    async def worker() -> None:
        for prompt in left:
            details: dict[str, float] = {}
            arrivals = []
            started = time.perf_counter()
            async with asyncio.timeout(TURN_TIMEOUT_S), aclosing(surface.turn(prompt, output_tokens, details)) as pieces:
                async for new in pieces:
                    if new:
                        arrivals.append((time.perf_counter(), new))
            sample = Sample(started, arrivals, details)
            if sample.tokens != output_tokens:
                raise RuntimeError(f"a turn brought {sample.tokens} tokens instead of {output_tokens}")
            samples.append(sample)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    await surface.finish()
    return samples


def figures(samples: Sequence[Sample]) -> dict[str, float]:
    """Figures in milliseconds and tokens per second. Details are means over turns, in milliseconds."""
    wall_s = max(s.arrivals[-1][0] for s in samples) - min(s.started for s in samples)
    ttft = [s.ttft_s for s in samples]
    gaps = [gap for s in samples for gap in s.inter_token_s()] or [0.0]
    details = {f"{key.removesuffix('_s')}_ms": 1e3 * fmean(s.details[key] for s in samples) for key in samples[0].details}
    return {
        "turns": len(samples),
        "wall_s": wall_s,
        "tokens_per_s": sum(s.tokens for s in samples) / wall_s,
        "ttft_p50_ms": 1e3 * quantile(ttft, 0.5),
        "ttft_p95_ms": 1e3 * quantile(ttft, 0.95),
        "ttft_mean_ms": 1e3 * fmean(ttft),
        "itl_p50_ms": 1e3 * quantile(gaps, 0.5),
        "itl_p95_ms": 1e3 * quantile(gaps, 0.95),
        "itl_mean_ms": 1e3 * fmean(gaps),
        **details,
    }


def quantile(values: Sequence[float], q: float) -> float:
    """The quantile at `q`, linear between the two nearest values."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def over_repeats(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Figure -> median, min and max over repeats."""
    values = {key: [run[key] for run in runs] for key in runs[0]}
    return {key: {"median": median(v), "min": min(v), "max": max(v)} for key, v in values.items()}
