"""The questions that a sharing mode answers. Orchestration and the vLLM plugin ask them and never look at the mode's name."""

from __future__ import annotations

from abc import ABC, abstractmethod


class SharingMode(ABC):
    """Policy of one sharing mode (README.md, "Sharing modes").

    Token counts are over the whole sequence a decode engine sees; `prompt_tokens` is n, the number of tokens before
    the first generated one, and at least 1.
    """

    name: str
    #: One line for `--help` and the README.
    summary: str

    #: True: prompt KV comes from the shared base pool. False: the pool has a prefill engine of its own.
    shares_prefill: bool
    #: True: a block's cache key ignores the adapter, because its KV is base KV whichever adapter asks for it (R5).
    adapters_share_blocks: bool
    #: True: full-weight decoders may be served; every mode serves LoRA adapters.
    full_weights: bool
    #: True: the KV of generated tokens is the base's, too. Then any decoder may use it, and the prefill pool may pull it
    #: instead of computing it.
    lends_responses: bool = False
    #: True: a decode engine that holds the base's weights may make the shared KV itself, in rows that run without adapter.
    base_in_place: bool = False
    #: True: a decoder may compute more than a prompt's last token itself, if it was trained for that.
    own_end: bool = False
    #: True: the decoder computes some layers of the shared prefix itself (kvshare/layer_group.py).
    recomputes: bool = False
    #: Our family of models that its decode engines run (kvshare_vllm/models/families.py); None: vLLM's own models.
    models: str | None = None
    #: Modules that an adapter may change; None: any. LoRA on others would have no effect.
    adapter_modules: frozenset[str] | None = None
    #: Architectures of bases (config.json) that it can serve; None: any that vLLM serves.
    architectures: frozenset[str] | None = None

    @abstractmethod
    def handoff_tokens(self, prompt_tokens: int, replayed: int = 0, own_tokens: int = 1) -> int:
        """How many leading tokens the prefill side computes and hands over (R1). `replayed`: generated tokens that follow
        the prompt of a request that is resumed. `own_tokens`: how many of the prompt's last tokens the decoder computes."""

    @abstractmethod
    def cacheable_tokens(self, prompt_tokens: int, computed_tokens: int, own_tokens: int = 1) -> int:
        """How many leading tokens the decode side may offer for reuse under the block's key (R2)."""


class PromptShared(SharingMode):
    """Modes in which only the prompt is shared, without its last token, or its last few. They are the decoder's first inputs:
    their KV, and all KV after it, is the decoder's own."""

    def handoff_tokens(self, prompt_tokens: int, replayed: int = 0, own_tokens: int = 1) -> int:
        return max(0, prompt_tokens - own_tokens)

    def cacheable_tokens(self, prompt_tokens: int, computed_tokens: int, own_tokens: int = 1) -> int:
        return min(computed_tokens, self.handoff_tokens(prompt_tokens, own_tokens=own_tokens))
