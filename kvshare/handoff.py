"""The KV handoff: what a prefill replica tells a decode replica about the blocks that it holds for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prefillshare.kvshare.logprobs import Logprobs

#: A read that ends less than this before the end of its lease, in seconds, counts as late. It allows for the error of the clock
#: offset that engines measure when they shake hands (half a round trip), and for how often they look.
LEASE_MARGIN_S = 0.5


@dataclass(frozen=True)
class Handoff:
    """A lease on prefilled KV blocks.

    Ownership: the prefill engine keeps the blocks until a decode engine has read them, `release` is called on a
    decode replica, or the lease ends, whichever is first. A read that may have outlived the lease is void (R6).
    """

    #: Tokens whose KV the blocks hold, from position 0.
    tokens: int
    #: Digest of the KV contract the blocks were made under (R4).
    contract: str
    #: Seconds that the lease lasts after the prefill engine has finished.
    lease_s: float
    #: The connector's parameters (vLLM's kv_transfer_params): opaque above the plugin.
    transfer: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class PrefillResult:
    """Answer of a prefill replica. `handoff` is None if there was nothing to hand over."""

    handoff: Handoff | None
    prompt_tokens: int
    cached_tokens: int
    prefill_s: float

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True)
class TokenChunk:
    """Newly generated tokens of one request, in order.

    logprobs: one row per token; None if not asked for.
    finish_reason: "stop" | "length" on the last chunk, else None. stop_reason: the stop token id, if one ended it.
    """

    token_ids: list[int]
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    #: What loading this request's prefix cost: bytes pulled over the transport, and prompt tokens found in the decode
    #: engine's own cache. The same on every chunk of a request.
    kv_bytes: int = 0
    local_tokens: int = 0
    #: Seconds from asking for the KV until the request could begin with it and, if it began with layers of its own, until the
    #: KV of the other layers was there, too.
    load_s: float = 0.0
    rest_load_s: float = 0.0
    #: On the last chunk of a request that was asked to lend: a handoff of the KV of all its tokens but the last, to be pulled.
    lent: Handoff | None = None
