"""One prefill replica: the base (or, where nothing is shared, a pool's own model) making KV for decode replicas.

A request's life here:
 1. `prefill` gives the engine the prompt's shared part; what is cached is not computed again (partial prefill).
 2. The engine holds the blocks under a lease and answers with the handoff.
 3. A decode engine reads them and says so, or the lease ends; either frees them. Cancelling the call frees them too.
"""

from __future__ import annotations

import ray
from ray import serve

from kvshare.engine_settings import EngineSettings
from kvshare.handoff import PrefillResult


class PrefillService:
    """Ray Serve deployment. One engine per replica."""

    async def __init__(self, settings: EngineSettings):
        from kvshare_vllm.engine import PrefillEngine

        self._engine = await PrefillEngine.start(settings, host=ray.util.get_node_ip_address())

    async def replica_id(self) -> str:
        return serve.get_replica_context().replica_id.unique_id

    async def prefill(
        self, token_ids: list[int], request_id: str, adapter: str | None = None, cache_salt: str | None = None
    ) -> PrefillResult:
        return await self._engine.prefill(token_ids, request_id, adapter=adapter, cache_salt=cache_salt)

    async def stats(self) -> dict[str, float]:
        return self._engine.stats()

    async def check_health(self) -> None:
        await self._engine.check_health()

    def __del__(self):
        if engine := getattr(self, "_engine", None):
            engine.close()
