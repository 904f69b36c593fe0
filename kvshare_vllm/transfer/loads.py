"""Loads of shared prefixes into an engine: which tokens are shared, who waits for whose load, what is pending, what it cost.

R1 (which prefix is read), R2 (blocks that lack KV are not offered) and R5 (no second load of the same blocks) are upheld here.
This module knows of no transport: the scheduler and a transport's connector call it. A request that computes layers itself has
a load in two parts: first what enters those layers, so that the request can begin, then the KV of the other layers, called
`rest_of(request_id)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.modes import SharingMode
from prefillshare.kvshare_vllm.transfer.load_overlap import LoadOverlap
from prefillshare.kvshare_vllm.transfer.params import Asked, LoadCost

if TYPE_CHECKING:
    from vllm.v1.request import Request

#: Suffix to the id of a request that computes layers itself, which names the load of the other layers' KV.
_REST = " rest"


def rest_of(request_id: str) -> str:
    return request_id + _REST


def request_of(name: str) -> str:
    """The request id in a load's name."""
    return name.removesuffix(_REST)


def is_rest(name: str) -> bool:
    return name.endswith(_REST)


@dataclass
class _Load:
    """The load of one request, from its beginning to the request's end."""

    cost: LoadCost
    #: When the load began; None if all KV was there.
    began: float | None
    group: LayerGroup | None
    #: Parts that are under way -> their bytes; empty if the load is in one part.
    parts: dict[str, int] = field(default_factory=dict)
    #: Keys of the blocks that are being loaded, for which other requests wait.
    keys: Sequence[Hashable] = ()
    #: The request has ended; its parts may still be under way.
    has_ended: bool = False


@dataclass(frozen=True)
class Arrival:
    """A load, or a part of one, that has succeeded or failed."""

    request_id: str
    is_whole: bool
    #: Of two parts, the one with which a request may begin.
    is_first: bool = False
    #: No other part is under way any more.
    is_last: bool = False


class Loads:
    """The loads of one engine. `block_bytes`: bytes of one block, (first part, rest), for a request that computes these layers
    itself; if it computes none, all bytes are in the rest."""

    def __init__(
        self,
        mode: SharingMode,
        block_size: int,
        block_bytes: Callable[[LayerGroup | None], tuple[int, int]],
        overlap: LoadOverlap,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.mode, self.overlap = mode, overlap
        self._block_size, self._block_bytes, self._clock = block_size, block_bytes, clock
        self._loads: dict[str, _Load] = {}
        #: Block key -> request that is loading this block now.
        self._loading: dict[Hashable, str] = {}

    def shared_tokens_of(self, request: Request) -> int:
        """Length of the prefix that is handed over, in tokens. In sharing modes it must be base KV (R1)."""
        prompt_tokens, own_tokens = request.num_prompt_tokens, Asked(request.kv_transfer_params).own_tokens
        return self.mode.handoff_tokens(prompt_tokens, request.num_tokens - prompt_tokens, own_tokens)

    def must_wait(self, request_id: str, missing_tokens: int, first_key: Callable[[], Hashable]) -> bool:
        """Whether another request is loading the first block that is missing (R5)."""
        return missing_tokens >= self._block_size and self._loading.get(first_key()) not in (None, request_id)

    def begins(
        self, request_id: str, *, shared_tokens: int, local_tokens: int, keys: Sequence[Hashable], group: LayerGroup | None
    ) -> None:
        """A request's load begins: blocks have been found for it. `keys`: those of the prompt's blocks."""
        missing = shared_tokens - local_tokens
        blocks = -(-missing // self._block_size)
        first, rest = (size * blocks for size in self._block_bytes(group))
        load = _Load(LoadCost(first + rest, local_tokens), self._clock() if missing else None, group)
        if group and missing:
            load.parts = {request_id: first, rest_of(request_id): rest}
        if missing:
            load.keys = keys[local_tokens // self._block_size : shared_tokens // self._block_size]
            self._loading |= dict.fromkeys(load.keys, request_id)
        self._loads[request_id] = load

    def group_of(self, request_id: str) -> LayerGroup | None:
        """The layers that a request computes itself, while its load is under way."""
        load = self._loads.get(request_id)
        return load.group if load and load.began is not None else None

    def arrived(self, name: str) -> Arrival:
        """Called once for each load in one part, and for each part of a load in two parts."""
        request_id = request_of(name)
        load = self._loads.get(request_id)
        if load is None or load.began is None:
            return Arrival(request_id, is_whole=True)
        self._time(load, name)
        if name not in load.parts:
            if load.group is None:
                self.is_there(request_id)
            return Arrival(request_id, is_whole=True)
        del load.parts[name]
        if load.has_ended and not load.parts:
            del self._loads[request_id]
        return Arrival(request_id, is_whole=False, is_first=name == request_id, is_last=not load.parts)

    def begins_early(self, request_id: str) -> bool:
        """Whether the request begins with its own layers while the rest is under way."""
        return self.overlap.begins(self._loads[request_id].parts.get(rest_of(request_id), 0))

    def rest_is_under_way(self, request_id: str) -> bool:
        load = self._loads.get(request_id)
        return load is not None and rest_of(request_id) in load.parts

    def is_under_way(self, request_id: str) -> bool:
        """Whether a part of a load in two parts is under way: the request's blocks may still be written to."""
        load = self._loads.get(request_id)
        return load is not None and bool(load.parts)

    def offered(self, request_id: str, tokens: int) -> int:
        """How many of the `tokens` that may be offered for reuse have KV in all layers (R2)."""
        return min(tokens, self._loads[request_id].cost.local_tokens) if self.rest_is_under_way(request_id) else tokens

    def is_there(self, request_id: str) -> None:
        """The request's prefix is there in full: others may find its blocks in the cache."""
        if load := self._loads.get(request_id):
            for key in load.keys:
                if self._loading.get(key) == request_id:
                    del self._loading[key]
            load.keys, load.group = (), None

    def cost(self, request_id: str) -> LoadCost | None:
        load = self._loads.get(request_id)
        return load.cost if load else None

    def forget(self, request_id: str) -> LoadCost | None:
        """The request has ended. Its blocks are still written to while a part `is_under_way`."""
        self.is_there(request_id)
        load = self._loads.get(request_id)
        if load is None:
            return None
        load.has_ended = True
        if not load.parts:
            del self._loads[request_id]
        return load.cost

    def _time(self, load: _Load, name: str) -> None:
        """Record how long a load took. The second of two parts begins when the first ends, or with it if that reads nothing."""
        now = self._clock()
        cost, took = load.cost, now - load.began
        if not is_rest(name):
            cost.load_s = took
            self.overlap.loaded(load.parts.get(name, 0), took)
            return
        cost.rest_load_s = took
        before = cost.load_s if load.group and load.group.transition else 0.0
        self.overlap.loaded(load.parts.get(name, 0), took - before)
