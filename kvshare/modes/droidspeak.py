"""DroidSpeak (arXiv 2411.02820): base KV in most layers, the decoder's own in a few, for decoders not trained for sharing."""

from __future__ import annotations

from prefillshare.kvshare.modes.base import PromptShared


class DroidSpeak(PromptShared):
    name = "droidspeak"
    summary = "prompt KV from the base, except in a few layers, which the decoder computes itself; needs no training"
    shares_prefill = True
    adapters_share_blocks = False
    full_weights = True
    recomputes = True
    models = "own_layers"
    architectures = frozenset({"LlamaForCausalLM", "Qwen3ForCausalLM"})
