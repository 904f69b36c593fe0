"""Metrics of vLLM and NIXL in an engine, for the node's metrics agent (Ray's), named by pool and replica: those of
kvshare/other_metrics.py, and no others, since the agent exports whatever it is told.

Seam: vllm/v1/metrics/ray_wrappers.py, vllm/v1/metrics/loggers.py (`gauge_lora_info`)
"""

from __future__ import annotations

import threading
import time
from typing import ClassVar

from vllm.v1.metrics.ray_wrappers import (
    RayCounterWrapper,
    RayGaugeWrapper,
    RayHistogramWrapper,
    RayKVConnectorProm,
    RayPerfMetricsProm,
    RayPrometheusMetric,
    RayPrometheusStatLogger,
    RaySpecDecodingProm,
)

from prefillshare.kvshare.other_metrics import ENGINE_METRICS

#: Ray's agent forgets a gauge that has not been set for two of its intervals (ten seconds each, unless configured), and an idle
#: engine sets none.
SET_AGAIN_S = 5.0
_NAMES = frozenset(ENGINE_METRICS)


class _Gauge(RayGaugeWrapper):
    #: (Ray's metric, its tags) -> the last value, of all gauges of this process.
    last: ClassVar[dict[tuple, float]] = {}

    def set(self, value: int | float):
        self.last[self.metric, tuple(self._tags.items())] = value
        return super().set(value)


class _Untold:
    """In place of a metric that nobody is told."""

    def labels(self, *_, **__) -> _Untold:
        return self

    def set(self, value: float) -> None: ...

    def set_to_current_time(self) -> None: ...

    def inc(self, value: float = 1.0) -> None: ...

    def observe(self, value: float) -> None: ...


def _exported(kind: type[RayPrometheusMetric]):
    """A maker of such metrics, for the class attributes by which vLLM's loggers are told what to make."""

    def make(name: str, *args, **kwargs) -> RayPrometheusMetric | _Untold:
        if RayPrometheusMetric._get_sanitized_opentelemetry_name(name) not in _NAMES:
            return _Untold()
        return kind(name, *args, **kwargs)

    return staticmethod(make)


class _SpecDecoding(RaySpecDecodingProm):
    _counter_cls = _exported(RayCounterWrapper)


class _KVConnector(RayKVConnectorProm):
    _gauge_cls = _exported(_Gauge)
    _counter_cls = _exported(RayCounterWrapper)
    _histogram_cls = _exported(RayHistogramWrapper)


class _Perf(RayPerfMetricsProm):
    _counter_cls = _exported(RayCounterWrapper)


class EngineMetrics(RayPrometheusStatLogger):
    _gauge_cls = _exported(_Gauge)
    _counter_cls = _exported(RayCounterWrapper)
    _histogram_cls = _exported(RayHistogramWrapper)
    _spec_decoding_cls, _kv_connector_cls, _perf_metrics_cls = _SpecDecoding, _KVConnector, _Perf

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Engines would build strings for a metric that nobody is told.
        self.gauge_lora_info = None
        threading.Thread(target=_keep_setting, name="engine-gauges", daemon=True).start()


def _keep_setting() -> None:
    while True:
        time.sleep(SET_AGAIN_S)
        for (metric, tags), value in list(_Gauge.last.items()):
            metric.set(value, tags=dict(tags))
