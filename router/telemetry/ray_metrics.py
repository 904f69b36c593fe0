"""Passes our metrics on to Ray's metrics agents. Each node's agent exports those of all Ray processes on it, so that a
Prometheus which scrapes every node finds every router and every engine.

At regular intervals Ray is told what has changed in the metrics of prometheus_client. A histogram's observations are told as
the middles of their buckets, as Ray's own export keeps no more of them. The exported names begin with `ray_`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Mapping
from itertools import pairwise
from types import SimpleNamespace

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric as Family

from prefillshare.kvshare.metrics import DEFINITIONS

logger = logging.getLogger(__name__)

TELL_S = 5.0


class RayMetrics:
    """`ray`: an object with Counter, Gauge and Histogram like those of ray.util.metrics; None: that module."""

    def __init__(self, registry: CollectorRegistry = REGISTRY, ray: SimpleNamespace | None = None):
        if ray is None:
            from ray.util import metrics as ray
        self._registry = registry
        make = {
            Counter: lambda m: ray.Counter(m.name, m.help, m.labels),
            Gauge: lambda m: ray.Gauge(m.name, m.help, m.labels),
            Histogram: lambda m: ray.Histogram(m.name, m.help, [b for b in m.buckets if b > 0], m.labels),
        }
        self._ray = {name: make[m.kind](m) for name, m in DEFINITIONS.items()}
        #: Sample's name and labels -> its value when it was last told.
        self._told: dict[tuple, float] = {}
        self._telling = threading.Lock()
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_telling())

    async def stop(self) -> None:
        """Stop after telling Ray what it has not been told yet."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self._try_to_tell()

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            await self._try_to_tell()

    async def _try_to_tell(self) -> None:
        try:
            await asyncio.to_thread(self.tell)
        except Exception:
            logger.exception("metrics could not be told to Ray")

    def tell(self) -> None:
        with self._telling:  # a thread that nobody waits for any more may still be telling
            self._tell()

    def _tell(self) -> None:
        there = set()
        for family in self._registry.collect():
            name = family.name + "_total" if family.type == "counter" else family.name
            if name not in DEFINITIONS:
                continue
            for labels, value, amount in _observed(family):
                if family.type == "gauge":
                    self._ray[name].set(value, tags=labels)
                    continue
                key = (name, value, *labels.items())
                there.add(key)
                was, self._told[key] = self._told.get(key, 0), amount
                new = amount - was if amount >= was else amount
                if family.type == "counter" and new:
                    self._ray[name].inc(new, tags=labels)
                elif family.type == "histogram":
                    for _ in range(round(new)):
                        self._ray[name].observe(value, tags=labels)
        for gone in self._told.keys() - there:  # it begins at 0 if it comes back
            del self._told[gone]


def _observed(family: Family) -> Iterator[tuple[Mapping[str, str], float, float]]:
    """Per bucket of a histogram: (labels, a value in the bucket, observations in it). Of a gauge: (labels, value, value), of a
    counter: (labels, 0, value)."""
    if family.type != "histogram":
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                yield sample.labels, sample.value if family.type == "gauge" else 0.0, sample.value
        return
    buckets: dict[tuple, list[tuple[float, float]]] = {}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            labels = {name: value for name, value in sample.labels.items() if name != "le"}
            buckets.setdefault(tuple(labels.items()), [(0.0, 0.0)]).append((float(sample.labels["le"]), sample.value))
    for labels, cumulative in buckets.items():
        for (low, before), (high, upto) in pairwise(cumulative):
            inside = (low + high) / 2 if high != float("inf") else 2 * low
            yield dict(labels), inside, upto - before
