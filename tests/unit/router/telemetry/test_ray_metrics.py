"""What is told to Ray adds up to what was counted."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from prefillshare.kvshare.metrics import DEFINITIONS, Metrics
from prefillshare.router.telemetry.ray_metrics import RayMetrics


class Told:
    """As a metric of ray.util.metrics; refuses labels that were not declared, as those do."""

    def __init__(self, name, description="", *rest):
        self.labels, self.counts, self.seen = set(rest[-1]), Counter(), Counter()
        self.boundaries = rest[0] if len(rest) == 2 else None

    def _key(self, tags):
        assert set(tags) == self.labels
        return tuple(tags.values())

    def inc(self, value, tags):
        assert value > 0
        self.counts[self._key(tags)] += value

    def set(self, value, tags):
        self.counts[self._key(tags)] = value

    def observe(self, value, tags):
        self.seen[(*self._key(tags), next((b for b in self.boundaries if value <= b), None))] += 1


@pytest.fixture
def told():
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    bridge = RayMetrics(registry, SimpleNamespace(Counter=Told, Gauge=Told, Histogram=Told))
    return metrics, bridge, bridge._ray


def test_counters_are_told_by_what_they_grew(told):
    metrics, bridge, ray = told
    metrics["turns_total"].labels("tools", "ok").inc(3)
    bridge.tell()
    bridge.tell()
    metrics["turns_total"].labels("tools", "ok").inc()
    metrics["turns_total"].labels("math", "ok").inc()
    bridge.tell()
    assert ray["prefillshare_turns_total"].counts == {("tools", "ok"): 4, ("math", "ok"): 1}


def test_what_went_and_came_back_is_told_from_zero_on(told):
    metrics, bridge, ray = told
    metrics["turns_total"].labels("tools", "ok").inc(3)
    metrics["turn_seconds"].labels("tools").observe(1)
    bridge.tell()
    metrics.forget(decoders=["tools"])
    metrics["turns_total"].labels("tools", "ok").inc(2)  # it is back before Ray was told that it had gone
    bridge.tell()
    metrics.forget(decoders=["tools"])
    bridge.tell()
    metrics["turns_total"].labels("tools", "ok").inc(4)
    metrics["turn_seconds"].labels("tools").observe(1)
    bridge.tell()
    assert ray["prefillshare_turns_total"].counts == {("tools", "ok"): 9}
    assert sum(ray["prefillshare_turn_seconds"].seen.values()) == 2


def test_gauges_are_told_as_they_are(told):
    metrics, bridge, ray = told
    metrics["replicas"].labels("agents", "usable").set_function(lambda: 2)
    metrics["turns_in_progress"].set(5)
    bridge.tell()
    assert ray["prefillshare_replicas"].counts == {("agents", "usable"): 2}
    assert ray["prefillshare_turns_in_progress"].counts == {(): 5}


@pytest.mark.parametrize("name", [name for name, m in DEFINITIONS.items() if m.kind.__name__ == "Histogram"])
def test_each_observation_is_told_once_and_in_its_bucket(told, name):
    metrics, bridge, ray = told
    metric, labels = DEFINITIONS[name], ["x"] * len(DEFINITIONS[name].labels)
    bounds = [b for b in metric.buckets if b > 0]
    values = [bounds[0] / 2, *((low + high) / 2 for low, high in pairwise(bounds)), 3 * bounds[-1]]
    for _ in range(2):
        for value in values:
            metrics[name.removeprefix("prefillshare_")].labels(*labels).observe(value)
        bridge.tell()
    assert ray[name].boundaries == bounds
    assert ray[name].seen == {(*labels, bound): 2 for bound in (*bounds, None)}


def test_every_metric_there_is_can_be_told(told):
    metrics, bridge, ray = told
    assert set(ray) == set(DEFINITIONS)
    for name, metric in DEFINITIONS.items():
        one = metrics[name.removeprefix("prefillshare_")]
        one = one.labels(*["x"] * len(metric.labels)) if metric.labels else one
        getattr(one, {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}[metric.kind.__name__])(1)
    bridge.tell()
    assert all(metric.counts or metric.seen for metric in ray.values())
