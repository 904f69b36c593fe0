"""One prefill replica: the base (or, in a pool that shares nothing, its own model) makes KV for decode replicas.

A request's life here:
 1. `prefill` gives the engine the prompt's shared part; what is cached is not computed again (partial prefill).
 2. The engine holds the blocks under a lease and answers with the handoff.
 3. The blocks are freed when a decode engine reports that it has read them, when the lease ends, or when the call is cancelled.

`warm` does only 1, for a context whose next turn is expected: nothing is held, and the blocks stay in the cache. `pull` is like
`warm`, for a context whose base KV a decode engine has lent: the KV is read instead of computed.
"""

from __future__ import annotations

from prefillshare.kvshare.handoff import Handoff, PrefillResult
from prefillshare.kvshare_vllm.engine.replica import EngineReplica


class PrefillService(EngineReplica):
    """Ray Serve deployment. One engine per replica."""

    @staticmethod
    def engine_class() -> type:
        from prefillshare.kvshare_vllm.engine.prefill_engine import PrefillEngine

        return PrefillEngine

    async def pull(
        self, token_ids: list[int], lent: Handoff, request_id: str, cache_salt: str | None = None
    ) -> PrefillResult:
        return await self._engine.pull(token_ids, lent, request_id, cache_salt=cache_salt)

    async def release(self, handoff: Handoff, request_id: str) -> None:
        await self._engine.release(handoff, request_id)
