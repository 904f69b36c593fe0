"""ICaRus (arXiv 2603.13281): the frozen base makes the KV of every token, adapters only predict."""

from __future__ import annotations

from kvshare.modes.base import SharingMode


class Icarus(SharingMode):
    name = "icarus"
    summary = "KV of prompt and response from the frozen base, for every decoder; adapters predict in a stream of their own"
    shares_prefill = True
    guards_prefix = True
    adapters_share_blocks = True
    full_weights = False
    two_streams = True

    def handoff_tokens(self, prompt_tokens: int) -> int:
        # The last prompt token is the first that the decode engine computes, in both streams.
        return prompt_tokens - 1

    def cacheable_tokens(self, prompt_tokens: int, computed_tokens: int) -> int:
        return computed_tokens
