"""One engine per Serve replica: its life from start to stop, the same for prefill and decode."""

from __future__ import annotations

from abc import ABC, abstractmethod

import ray
from ray import serve

from kvshare.engine_settings import EngineSettings


class EngineReplica(ABC):
    """Base of the Serve deployments. The class is imported where nothing runs; the engine's own is not."""

    @staticmethod
    @abstractmethod
    def engine_class() -> type: ...

    async def __init__(self, settings: EngineSettings):
        self._engine = await self.engine_class().start(settings, host=ray.util.get_node_ip_address())

    async def replica_id(self) -> str:
        return serve.get_replica_context().replica_id.unique_id

    async def stats(self) -> dict[str, float]:
        return self._engine.stats()

    async def check_health(self) -> None:
        await self._engine.check_health()

    def __del__(self):
        if engine := getattr(self, "_engine", None):
            engine.close()
