"""No sharing: every model prefills for itself, as in other systems today. The baseline of all measurements."""

from __future__ import annotations

from prefillshare.kvshare.modes.base import SharingMode


class PerModel(SharingMode):
    name = "none"
    summary = "per-model baseline: own prefill engine; adapters on prefill and decode engines, with a cache per adapter"
    shares_prefill = False
    adapters_share_blocks = False
    full_weights = True

    def handoff_tokens(self, prompt_tokens: int, replayed: int = 0, own_tokens: int = 1) -> int:
        return max(0, prompt_tokens - 1)

    def cacheable_tokens(self, prompt_tokens: int, computed_tokens: int, own_tokens: int = 1) -> int:
        return computed_tokens
