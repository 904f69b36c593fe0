"""The engine that computes KV and hands it over."""

from __future__ import annotations

from prefillshare.kvshare.errors import Internal, PrefillShareError
from prefillshare.kvshare.handoff import Handoff, PrefillResult
from prefillshare.kvshare_vllm.engine.engine import Engine
from prefillshare.kvshare_vllm.transfer import params


class PrefillEngine(Engine):
    async def pull(
        self, token_ids: list[int], lent: Handoff, request_id: str, *, cache_salt: str | None = None
    ) -> PrefillResult:
        """Cache base KV that a decode engine has lent: only the last token's KV is computed, all other KV is read.

        This engine owns the loan from the call on: it reads the KV or has the decode engine told that nobody will.
        Raises PrefixLost if it cannot be read.
        """
        wanted = len(token_ids) - 1
        # vLLM aligns both engines' blocks at the end, and a decode engine may have one more than the tokens fill.
        ask = params.to_pull(lent.transfer, -(-wanted // self.settings.block_size))
        try:
            if lent.contract != self.settings.contract or wanted > lent.tokens:
                raise Internal(f"a loan of {lent.tokens} tokens under contract {lent.contract} for {wanted} tokens")
            output, seconds = await self._prefill(token_ids, request_id, None, cache_salt, 0, ask)
        except PrefillShareError as error:
            await self._release_unseen(lent, request_id, error)
            raise
        return PrefillResult(None, len(token_ids), output.num_cached_tokens or 0, seconds)
