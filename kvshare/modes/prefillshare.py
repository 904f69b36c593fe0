"""PrefillShare (arXiv 2602.12029): base KV for the prompt, the decoder's own, private KV for what it generates."""

from __future__ import annotations

from kvshare.modes.base import SharingMode


class PrefillShare(SharingMode):
    name = "prefillshare"
    summary = "prompt KV from one frozen base for all decoders; generated KV private to the decoder"
    shares_prefill = True
    guards_prefix = True
    adapters_share_blocks = True
    full_weights = True

    def handoff_tokens(self, prompt_tokens: int, replayed: int = 0) -> int:
        # The last prompt token is the decoder's first input: its KV is the decoder's.
        return prompt_tokens - 1

    def cacheable_tokens(self, prompt_tokens: int, computed_tokens: int) -> int:
        return min(computed_tokens, prompt_tokens - 1)
