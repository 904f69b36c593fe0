"""vLLM's and NIXL's own metrics of an engine, for the node's metrics agent (Ray's), named by pool and replica.

Seam: vllm/v1/metrics/ray_wrappers.py, vllm/v1/metrics/loggers.py (`gauge_lora_info`)
"""

from __future__ import annotations

import threading
import time
from typing import ClassVar

from vllm.v1.metrics.ray_wrappers import RayGaugeWrapper, RayPrometheusStatLogger

#: Ray's agent forgets a gauge that has not been set for two of its intervals (ten seconds each, unless configured), and an idle
#: engine sets none.
SET_AGAIN_S = 5.0


class _Gauge(RayGaugeWrapper):
    #: (Ray's metric, its tags) -> the last value, of all gauges of this process.
    last: ClassVar[dict[tuple, float]] = {}

    def set(self, value: int | float):
        self.last[self.metric, tuple(self._tags.items())] = value
        return super().set(value)


class EngineMetrics(RayPrometheusStatLogger):
    _gauge_cls = _Gauge

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # It would have a series for every set of adapters that ever ran together, without bound.
        self.gauge_lora_info = None
        threading.Thread(target=_keep_setting, name="engine-gauges", daemon=True).start()


def _keep_setting() -> None:
    while True:
        time.sleep(SET_AGAIN_S)
        for (metric, tags), value in list(_Gauge.last.items()):
            metric.set(value, tags=dict(tags))
