"""Memory and open files of the system's processes, and whether they grow with turns."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.shared.beside import Beside

EVERY_S = 5.0
#: Seconds of a process's life in which its memory has not yet settled: its KV cache is touched block by block.
SETTLES_S = 300.0
#: What the title of a process has in it -> its kind.
KINDS = {
    "ServeReplica:prefillshare:router": "router", "ServeReplica:prefillshare:": "replica", "EngineCore": "engine",
    "ProxyActor": "proxy", "ServeController": "controller", "raylet/raylet": "raylet", "gcs_server": "gcs",
    "redis-server": "redis",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Of one process, `life`, when so many turns had been taken and it was so old. `rss`: bytes; `files`: open ones."""

    kind: str
    life: str
    turns: int
    age_s: float
    rss: int
    files: int


def look(turns: int) -> list[Sample]:
    """At all processes that this process has started."""
    samples = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:2])
            kind = next((kind for part, kind in KINDS.items() if part in title), "")
            if kind:
                began = process.create_time()
                age_s = time.time() - began
                rss, files = process.memory_info().rss, process.num_fds()
                samples.append(Sample(kind, f"{process.pid}-{began:.0f}", turns, age_s, rss, files))
        except psutil.Error:
            continue
    return samples


class Watch(Beside):
    """Looks every few seconds, while the context lasts. `turns()`: taken so far."""

    def __init__(self, turns: Callable[[], int]):
        super().__init__()
        self._turns, self.samples = turns, []

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.samples += look(self._turns())


def growth(samples: Iterable[Sample], of: Callable[[Sample], float]) -> dict[str, float]:
    """Kind of process -> by how much `of` grows per turn: the slope that all its processes have in common, each with a level of
    its own (least squares within lives). Kinds of which no process has lived long enough are left out."""
    lives: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.age_s > SETTLES_S:
            lives[sample.kind, sample.life].append(sample)
    products: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (kind, _), seen in lives.items():
        turns, values = [sample.turns for sample in seen], [of(sample) for sample in seen]
        products[kind][0] += _product(turns, values)
        products[kind][1] += _product(turns, turns)
    return {kind: both / alone for kind, (both, alone) in products.items() if alone}


def _product(these: Sequence[float], those: Sequence[float]) -> float:
    """The sum of products of the deviations from their means."""
    this, that = sum(these) / len(these), sum(those) / len(those)
    return sum((a - this) * (b - that) for a, b in zip(these, those, strict=True))
