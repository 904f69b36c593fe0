"""What a router asks of a decode replica, as one value that is passed from the router to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefillshare.kvshare.handoff import Handoff
from prefillshare.kvshare.layer_group import LayerGroup


@dataclass(frozen=True)
class DecodeRequest:
    """Generate after `token_ids`, whose last `replay` tokens this turn generated in earlier attempts.

    sampling: the turn's own SamplingParams (vLLM). Its limits apply to the whole turn.
    """

    request_id: str
    token_ids: list[int]
    #: Handoff of the shared prefix. None: there is nothing to share, or the engine makes the KV itself. From the call on, the
    #: decode engine owns it: it reads the KV, or has the prefill engine told that nobody will.
    handoff: Handoff | None
    sampling: Any
    #: None: the base, or the pool's own weights.
    adapter: str | None = None
    replay: int = 0
    cache_salt: str | None = None
    #: Lower is sooner, as in vLLM.
    priority: int = 0
    #: Tokens of the shared prefix that the router expects the engine to compute; all routers are told of them as load.
    queued_tokens: int = 0
    #: Whether to hold the KV for the prefill pool at the end (modes whose generated KV is base KV).
    lend: bool = False
    #: Layers that the decoder computes over the shared prefix, instead of taking them from the base (modes that recompute).
    own_layers: LayerGroup | None = None
    #: How many of the prompt's last tokens the decoder computes itself: those that the handoff does not cover.
    own_tokens: int = 1
    #: W3C trace headers.
    trace: Mapping[str, str] | None = None
