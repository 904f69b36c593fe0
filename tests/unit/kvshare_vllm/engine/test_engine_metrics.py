"""Engines tell Ray the metrics that are exported, and no others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prefillshare.kvshare.other_metrics import ENGINE_METRICS
from prefillshare.kvshare_vllm.engine.metrics import EngineMetrics


class Told:
    """As a metric of ray.util.metrics."""

    made: dict[str, Told]

    def __init__(self, name, description="", tag_keys=(), **_):
        self._tag_keys, self.values = tuple(tag_keys), []
        self.made[name] = self

    def inc(self, value, tags):
        self.values.append((value, tags))

    set = observe = inc


@pytest.fixture
def made(monkeypatch):
    from vllm.v1.metrics import ray_wrappers

    monkeypatch.setattr(Told, "made", {}, raising=False)
    monkeypatch.setattr(ray_wrappers, "ray_metrics", SimpleNamespace(Counter=Told, Gauge=Told, Histogram=Told))
    monkeypatch.setattr(ray_wrappers, "_get_replica_id", lambda: "a1")
    return Told.made


LABELS = ["model_name", "engine"]


def test_a_metric_that_is_exported_is_told_with_the_replica(made):
    running = EngineMetrics._gauge_cls(name="vllm:num_requests_running", documentation="", labelnames=LABELS)
    running.labels("agents", "0").set(3)
    tokens = EngineMetrics._counter_cls(name="vllm:prompt_tokens", documentation="", labelnames=LABELS)
    tokens.labels("agents", "0").inc(5)
    of = {"model_name": "agents", "engine": "0", "ReplicaId": "a1"}
    assert made["vllm_num_requests_running"].values == [(3, of)]
    assert made["vllm_prompt_tokens"].values == [(5, of)]


def test_all_others_cost_nothing(made):
    for kind in (EngineMetrics._gauge_cls, EngineMetrics._counter_cls, EngineMetrics._histogram_cls):
        metric = kind(name="vllm:e2e_request_latency_seconds", documentation="", labelnames=LABELS)
        labelled = metric.labels("agents", engine="0")
        labelled.inc()
        labelled.set(1)
        labelled.observe(1)
        labelled.set_to_current_time()
    assert not made


def test_connector_and_speculation_are_told_in_the_same_way(made):
    kinds = EngineMetrics._kv_connector_cls
    kinds._histogram_cls(name="vllm:nixl_xfer_time_seconds", documentation="", labelnames=LABELS, buckets=[1])
    kinds._histogram_cls(name="vllm:nixl_num_descriptors", documentation="", labelnames=LABELS, buckets=[1])
    kinds._counter_cls(name="vllm:nixl_num_failed_transfers", documentation="", labelnames=LABELS)
    EngineMetrics._spec_decoding_cls._counter_cls(name="vllm:spec_decode_num_drafts", documentation="", labelnames=LABELS)
    EngineMetrics._perf_metrics_cls._counter_cls(name="vllm:estimated_flops_per_gpu", documentation="", labelnames=LABELS)
    assert made.keys() == {"vllm_nixl_xfer_time_seconds", "vllm_nixl_num_failed_transfers"}
    assert made.keys() <= ENGINE_METRICS.keys()
