"""PrefillShare (arXiv 2602.12029): the base's KV for the prompt, and the decoder's own, private KV for what it generates."""

from __future__ import annotations

from prefillshare.kvshare.modes.base import PromptShared


class PrefillShare(PromptShared):
    name = "prefillshare"
    summary = "prompt KV from one frozen base for all decoders; generated KV is private to the decoder"
    shares_prefill = True
    adapters_share_blocks = True
    full_weights = True
    base_in_place = True
    own_end = True
