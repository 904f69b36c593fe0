"""How an engine fares, as its scheduler last reported.

Seam: vllm/v1/metrics/loggers.py
"""

from __future__ import annotations

import asyncio
import time

from vllm.v1.metrics.loggers import StatLoggerBase


class Gauges(StatLoggerBase):
    """Keeps the scheduler's last figures at hand."""

    def __init__(self, vllm_config, engine_index: int = 0):
        self.running = self.waiting = 0
        self.kv_usage = 0.0
        self.preemptions = 0
        self.stepped_at = 0.0
        self.nothing_held = asyncio.Event()
        self.nothing_held.set()

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0, **_):
        self.stepped_at = time.monotonic()
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
            (self.nothing_held.clear if self.kv_usage else self.nothing_held.set)()
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self):
        pass
