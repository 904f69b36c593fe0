"""One decode replica: a full-weight decoder, or the base with several LoRA decoders.

A request's life here:
 1. `decode` gives the engine prompt, handoff and sampling; the engine checks the handoff's contract.
 2. The engine pulls the blocks it lacks, or makes the base's KV itself if there is no handoff, and generates; tokens stream
    out as they are made.
 3. If the engine loses the shared prefix (preemption, failed or late load), it raises PrefixLost; the router has the prefix
    handed over again and sends the turn back with the tokens so far (`replay`). An engine that holds the base computes a
    preempted request again by itself.
 4. Closing the stream aborts the request and frees its blocks.
"""

from __future__ import annotations

from contextlib import ExitStack, aclosing

from prefillshare.kvshare.decode_request import DecodeRequest
from prefillshare.kvshare.handoff import Handoff
from prefillshare.kvshare_vllm.engine.replica import EngineReplica


class DecodeService(EngineReplica):
    """Ray Serve deployment. One engine per replica."""

    @staticmethod
    def engine_class() -> type:
        from prefillshare.kvshare_vllm.engine.decode_engine import DecodeEngine

        return DecodeEngine

    async def decode(self, request: DecodeRequest):
        """Yields TokenChunk."""
        with ExitStack() as until_first:
            until_first.enter_context(self._queued(request.queued_tokens))
            async with aclosing(self._engine.decode(request)) as chunks:
                async for chunk in chunks:
                    until_first.close()
                    yield chunk

    async def own_next(self, token_ids: list[int], adapter: str | None, top: int, priority: int):
        """As DecodeEngine.own_next."""
        return await self._engine.own_next(token_ids, adapter=adapter, top=top, priority=priority)

    async def release(self, handoff: Handoff, request_id: str) -> None:
        await self._engine.release(handoff, request_id)

    async def give_up(self, handoff: Handoff, request_id: str) -> None:
        await self._engine.give_up(handoff, request_id)
