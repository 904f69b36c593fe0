"""The KV handoff: what a prefill replica tells a decode replica about blocks it holds for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.trace import INVALID_SPAN, Span

from kvshare.caller import Caller

#: A read that ends so near the end of its lease counts as late: slack for the error of the clock offset that engines measure
#: when they shake hands (half a round trip), and for how often they look.
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
    #: Seconds the lease lasts from when the prefill engine finished.
    lease_s: float
    #: Connector's parameters (vLLM's kv_transfer_params): opaque above the plugin.
    transfer: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class PrefillResult:
    """Answer of a prefill replica. `handoff` is None where there was nothing to hand over."""

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

    logprobs: per token, a list of (token id, log-probability, rank), the sampled token first; None if not asked.
    finish_reason: "stop" | "length" on the last chunk, else None. stop_reason: the stop token id, if one ended it.
    """

    token_ids: list[int]
    logprobs: list[list[tuple[int, float, int]]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    #: What loading this request's prefix cost: bytes pulled over the transport, and prompt tokens found in the decode
    #: engine's own cache. The same on every chunk of a request.
    kv_bytes: int = 0
    local_tokens: int = 0
    #: Seconds from asking for the KV until the request could begin with it, and, where it began with layers of its own, until
    #: that of the other layers was there, too.
    load_s: float = 0.0
    rest_load_s: float = 0.0
    #: On the last chunk of a request that was asked to lend: the KV of all its tokens but the last, to be pulled.
    lent: Handoff | None = None


@dataclass
class TurnUsage:
    """What one turn cost. Times in seconds, measured at the router."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Prompt tokens the prefill side found in its cache / had to compute; tokens prefilled = their sum.
    cached_tokens: int = 0
    computed_tokens: int = 0
    #: What the router's index had said of cached_tokens.
    predicted_tokens: int = 0
    kv_bytes: int = 0
    #: Times the turn was taken up again: preempted, a failed load, a lost replica.
    resumes: int = 0
    #: Waited for room before the prefill.
    queue_s: float = 0.0
    prefill_s: float = 0.0
    #: The decode engine's, as in TokenChunk.
    load_s: float = 0.0
    rest_load_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    prefill_replica: str = ""
    decode_replica: str = ""
    #: Layers that the decoder computed itself over the prompt, like "4-9"; "": none.
    own_layers: str = ""

    def report(self) -> dict[str, int | float | str]:
        """As clients see it: names and meanings of message Usage (protos/prefillshare/v1)."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "computed_tokens": self.computed_tokens,
            "kv_bytes_transferred": self.kv_bytes,
            "time_to_first_token_s": self.ttft_s,
            "total_s": self.total_s,
            "prefill_s": self.prefill_s,
            "resumes": self.resumes,
            "prefill_replica": self.prefill_replica,
            "decode_replica": self.decode_replica,
            "predicted_tokens": self.predicted_tokens,
            "own_layers": self.own_layers,
            "kv_load_s": self.load_s,
            "kv_rest_load_s": self.rest_load_s,
        }


@dataclass
class TurnContext:
    """What travels with one turn through the router. `session`: the router's session, opaque to the layers below it."""

    usage: TurnUsage = field(default_factory=TurnUsage)
    session: Any = None
    #: Who takes the turn, and how soon (lower is sooner); "" where there are no tenants.
    tenant: str = ""
    priority: int = 0
    #: Prompts of different domains never share KV (R7).
    cache_domain: str = ""
    #: Of the domain and the client's own salt. Mixed into the keys of the prompt's blocks on both sides: prompts of
    #: different salts never share KV.
    cache_salt: str | None = None
    #: The decode engine is to lend the context's KV at the end, where its mode lets it (True); what it lent.
    lend: bool = False
    lent: Handoff | None = None
    #: Awaited, within the turn's time, before its prefix is looked up; None: nothing is to be waited for.
    ready: Callable[[], Awaitable[None]] | None = None
    #: Seconds the client waits; None: the deployment's default.
    deadline_s: float | None = None
    #: Its span (kvshare/tracing.py), while it runs.
    span: Span = INVALID_SPAN
    #: Set where the text is made: the response is whole, although a stop text cut the tokens short.
    ended_well: bool = False

    @classmethod
    def of(cls, caller: Caller, **given) -> TurnContext:
        return cls(tenant=caller.tenant, priority=caller.priority, cache_domain=caller.cache_domain, **given)
