"""vLLM's and NIXL's own metrics of an engine, for the node's metrics agent (Ray's), named by pool and replica.

Seam: vllm/v1/metrics/ray_wrappers.py, vllm/v1/metrics/loggers.py (`gauge_lora_info`)
"""

from __future__ import annotations

from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger


class EngineMetrics(RayPrometheusStatLogger):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # One series for every set of adapters that ever ran together: without bound.
        self.gauge_lora_info = None
