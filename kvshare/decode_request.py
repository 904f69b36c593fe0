"""What a router asks of a decode replica: one value, from the router to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefillshare.kvshare.handoff import Handoff
from prefillshare.kvshare.layer_group import LayerGroup


@dataclass(frozen=True)
class DecodeRequest:
    """Generate after `token_ids`, whose last `replay` tokens this turn generated earlier, elsewhere.

    sampling: vLLM's SamplingParams, the turn's own: its limits count over the whole turn.
    """

    request_id: str
    token_ids: list[int]
    #: Of the shared prefix. None: there is nothing to share. From the call on it is the engine's: it reads it, or has the
    #: prefill engine told that nobody will.
    handoff: Handoff | None
    sampling: Any
    #: None: the base, or the pool's own weights.
    adapter: str | None = None
    replay: int = 0
    cache_salt: str | None = None
    #: Lower is sooner, as in vLLM.
    priority: int = 0
    #: At the end hold the KV for the prefill pool (modes whose generated KV is base KV).
    lend: bool = False
    #: Computed here over the shared prefix, instead of taken from the base (modes that recompute).
    own_layers: LayerGroup | None = None
    #: W3C headers.
    trace: Mapping[str, str] | None = None
