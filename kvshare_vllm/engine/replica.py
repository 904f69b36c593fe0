"""One engine per Serve replica: its life from start to stop, the same for prefill and decode."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import ray
from ray import serve

from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.handoff import PrefillResult
from prefillshare.kvshare.keep import Keep
from prefillshare.kvshare.replica_info import ReplicaInfo, ReplicaStats
from prefillshare.kvshare_vllm.engine import quick_start, ray_node
from prefillshare.kvshare_vllm.patches import vllm_logging


class EngineReplica(ABC):
    """Base of the Serve deployments. This class is also imported where no engine runs; the engine's own class is not."""

    @staticmethod
    @abstractmethod
    def engine_class() -> type: ...

    async def __init__(self, settings: EngineSettings):
        vllm_logging.set_up(settings.log_level, settings.log_format)
        self._queued_tokens = 0
        with quick_start.paused():
            from prefillshare.kvshare_vllm.engine.metrics import EngineMetrics

            engine_class = self.engine_class()
        self._engine = await engine_class.start(settings, host=ray_node.join(), stat_loggers=(EngineMetrics,))

    async def reconfigure(self, changeable: dict) -> None:
        """Serve calls this at the start, and when the adapters to serve or the log's level have changed."""
        await self._engine.set_adapters(changeable["adapters"])
        await self._engine.set_log_level(changeable["log_level"])

    async def adapters(self) -> dict[str, str]:
        """The adapters it was told to serve: name -> why it cannot, empty if it does. Those still being loaded are left out."""
        return dict.fromkeys(self._engine.adapters, "") | dict(self._engine.adapter_problems)

    async def describe(self) -> ReplicaInfo:
        engine = self._engine
        return ReplicaInfo(
            serve.get_replica_context().replica_id.unique_id,
            engine.kv_events,
            engine.blocks_total,
            engine.settings.block_size,
            engine.settings.max_num_seqs,
            ray.util.get_node_ip_address(),
            os.getpid(),
        )

    async def stats(self) -> ReplicaStats:
        """Raises Unavailable if the engine has died."""
        await self._engine.check_health()
        return replace(self._engine.stats(), queued_tokens=self._queued_tokens)

    async def probe(self) -> None:
        """Raises unless the engine computes."""
        await self._engine.probe()

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def prefill(
        self,
        token_ids: list[int],
        request_id: str,
        adapter: str | None = None,
        cache_salt: str | None = None,
        queued_tokens: int = 0,
        priority: int = 0,
        trace: Mapping[str, str] | None = None,
    ) -> PrefillResult:
        """`queued_tokens`: tokens that the router expects to be computed, reported to all routers as this replica's load."""
        with self._queued(queued_tokens):
            return await self._engine.prefill(
                token_ids, request_id, adapter=adapter, cache_salt=cache_salt, priority=priority, trace=trace
            )

    async def warm(
        self,
        token_ids: list[int],
        request_id: str,
        cache_salt: str | None = None,
        queued_tokens: int = 0,
        priority: int = 0,
        keep: Sequence[Keep] = (),
    ) -> PrefillResult:
        with self._queued(queued_tokens):
            return await self._engine.warm(token_ids, request_id, cache_salt=cache_salt, priority=priority, keep=keep)

    async def let_go(self, names: Sequence[str]) -> None:
        await self._engine.let_go(names)

    @contextmanager
    def _queued(self, tokens: int):
        self._queued_tokens += tokens
        try:
            yield
        finally:
            self._queued_tokens -= tokens

    async def __del__(self):
        """Serve calls this when no call is running any more. Waits until no KV is leased, at most for the length of a lease."""
        if engine := getattr(self, "_engine", None):
            await engine.nothing_held()
            engine.close()
