"""ICaRus (arXiv 2603.13281): the frozen base makes the KV of every token; adapters only predict."""

from __future__ import annotations

from prefillshare.kvshare.modes.base import SharingMode


class Icarus(SharingMode):
    name = "icarus"
    summary = "KV of prompt and response from the frozen base, for all decoders; adapters only predict, in their own stream"
    shares_prefill = True
    adapters_share_blocks = True
    full_weights = False
    base_in_place = True
    lends_responses = True
    models = "two_streams"
    architectures = frozenset({"LlamaForCausalLM", "Qwen3ForCausalLM"})
    #: No adapter makes keys or values.
    adapter_modules = frozenset({"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})

    def handoff_tokens(self, prompt_tokens: int, replayed: int = 0, own_tokens: int = 1) -> int:
        # The last token is the first that the decode engine computes, in both streams.
        return prompt_tokens + replayed - 1

    def cacheable_tokens(self, prompt_tokens: int, computed_tokens: int, own_tokens: int = 1) -> int:
        return computed_tokens
