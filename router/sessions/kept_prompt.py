"""What a call over HTTP asks to be kept of its prompt: by Anthropic's `cache_control`, or by OpenAI's `prompt_cache_retention`.

Within the tenant's budget it is kept as soon as the turn has computed it, before the first output, whose usage says so: a call
that is refused, or fails before, takes up nothing of the budget. Beyond the budget the call is served all the same: its usage
says that nothing was kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from prefillshare.kvshare.caller import Caller, cache_salt
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.run import KeepPrompt
from prefillshare.router.kept.keeper import Keeper

#: OpenAI's names of how long a prompt is kept -> seconds; 0: as long as the caches keep it by themselves.
RETENTIONS_S = {"in_memory": 0.0, "in-memory": 0.0, "24h": 86400.0}

#: (token ids, seconds).
Beginning = tuple[list[int], float]


def retention_s(request: Any) -> float:
    """Seconds for which a request asks its prompt to be kept. Raises InvalidInput."""
    asked = getattr(request, "prompt_cache_retention", None)
    if asked is None:
        return 0.0
    if asked not in RETENTIONS_S:
        raise InvalidInput(
            f"{str(asked)[:32]!r} is not known", field="prompt_cache_retention", fix="use in_memory or 24h, or leave it out"
        )
    return RETENTIONS_S[asked]


class KeptPrompt:
    """Of one call. `keeper`: None where nothing may be kept."""

    def __init__(self, keeper: Keeper | None):
        self._keeper = keeper
        self.beginnings: Sequence[Beginning] = ()
        self._keeping, self._kept_tokens = asyncio.Lock(), None

    def of(
        self, caller: Caller, prompt: list[int], client_salt: str | None, request: Any, *, whole: bool = False
    ) -> KeepPrompt | None:
        """What keeps as much of the prompt as the call asks for; None if it asks for nothing. `whole`: what asks for a
        beginning means all of it, since it was laid out in another way."""
        asked = [(len(prompt) if whole else _common(prompt, token_ids), ttl_s) for token_ids, ttl_s in self.beginnings]
        if ttl_s := retention_s(request):
            asked.append((len(prompt), ttl_s))
        if not asked or self._keeper is None:
            return None
        return partial(self._keep, caller, prompt, cache_salt(caller.cache_domain, client_salt), asked)

    async def _keep(self, caller: Caller, prompt: list[int], salt: str | None, asked: Sequence[tuple[int, float]]) -> int:
        """Several responses have one prompt: it is kept once."""
        async with self._keeping:
            if self._kept_tokens is None:
                granted = await self._keeper.grant(caller, prompt, salt, asked)
                self._keeper.hold(granted, prompt, salt)
                self._kept_tokens = self._keeper.tokens(granted[-1]) if granted else 0
            return self._kept_tokens


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
