"""What an engine keeps in its prefix cache because somebody asked for it: read from vLLM's KV hints, upheld by its scheduler.

 1. A request may carry hints (vLLM's KvHintsEnvelope). "keep" names a beginning of its prompt, a time and a priority; "let_go"
    names what is to be kept no longer.
 2. When a request with "keep" has ended well, the blocks of that beginning which the prefix cache has are kept under the name
    (kept_blocks.py), until the time is over, they are let go, or requests need the room. Only what the cache offers anyway is
    kept (R2), under its salted keys (R7).
 3. What is kept is published with the KV events (kv_events.py).

No thread watches the time: what is over is let go when the scheduler next makes a step, and is given up first until then.

Seam: vllm/v1/kv_hints/protocol.py; vllm/v1/core/sched/scheduler.py (`add_request`, `schedule`, `_free_request`,
`reset_prefix_cache`); vllm/v1/core/kv_cache_coordinator.py (`find_longest_cache_hit`)
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope
from vllm.v1.request import RequestStatus

from prefillshare.kvshare.keep import Keep
from prefillshare.kvshare_vllm.engine.kept_blocks import KeptBlocks
from prefillshare.kvshare_vllm.engine.kv_events import KeptChanged

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

_VERSION, _KEEP, _LET_GO = "1", "keep", "let_go"
#: How a request ends that has computed its prompt.
_ENDED_WELL = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


def hints(keep: Iterable[Keep] = (), let_go: Iterable[str] = ()) -> KvHintsEnvelope | None:
    """The hints of a request that keeps beginnings of its prompt, and lets go what was kept under names. None without any."""
    payloads = [(_KEEP, asdict(one)) for one in keep] + [(_LET_GO, {"name": name}) for name in let_go]
    actions = [KvHintAction(str(number), kind, _VERSION, payload) for number, (kind, payload) in enumerate(payloads)]
    return KvHintsEnvelope(_VERSION, uuid.uuid4().hex, actions) if actions else None


def _payloads(request: Request, kind: str) -> Iterator[dict]:
    """Of the request's actions of this kind. Actions of other kinds or versions are not ours."""
    for action in request.kv_hints.actions if request.kv_hints else ():
        if (action.action_type, action.action_version) == (kind, _VERSION):
            yield action.payload


class Retention:
    """What is kept in the cache of a vLLM engine: `manager` is its scheduler's."""

    def __init__(self, manager: KVCacheManager, clock: Callable[[], float] = time.monotonic):
        self._coordinator, self._pool = manager.coordinator, manager.block_pool
        self.kept = self._pool.free_block_queue = KeptBlocks(self._pool.free_block_queue, self._tell, clock)

    def begins(self, request: Request) -> None:
        """Let go what a request that has come lets go."""
        for payload in _payloads(request, _LET_GO):
            self.kept.let_go(payload["name"])

    def ended(self, request: Request) -> None:
        """Keep what a request that has ended keeps. To be called before its blocks are freed."""
        if request.status not in _ENDED_WELL:
            return
        for payload in _payloads(request, _KEEP):
            asked = Keep(**payload)
            most = min(asked.tokens, request.num_prompt_tokens)
            groups = self._coordinator.find_longest_cache_hit(request.block_hashes, most)[0]
            sizes = self._coordinator.group_block_sizes
            blocks = [
                (size * number, block)
                for group, size in zip(groups, sizes, strict=True)
                for number, block in enumerate(group, 1)
                if not block.is_null
            ]
            blocks.sort(key=lambda one: one[0])
            self.kept.keep(asked.name, blocks, asked.ttl_s, asked.priority)

    def _tell(self, name: str, tokens: int, blocks: int, given_up: int, why: str) -> None:
        if self._pool.enable_kv_cache_events:
            self._pool.kv_event_queue.append(KeptChanged(name, tokens, blocks, given_up, why))


class Keeping:
    """Mixed into vLLM's schedulers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.retention = Retention(self.kv_cache_manager)

    def add_request(self, request: Request) -> None:
        self.retention.begins(request)
        super().add_request(request)

    def schedule(self, *args, **kwargs):
        self.retention.kept.expire()
        return super().schedule(*args, **kwargs)

    def _free_request(self, request: Request, delay_free_blocks: bool = False):
        self.retention.ended(request)
        return super()._free_request(request, delay_free_blocks)

    def reset_prefix_cache(self, *args, **kwargs) -> bool:
        if done := super().reset_prefix_cache(*args, **kwargs):
            self.retention.kept.clear()
        return done


class KeepingScheduler(Keeping, AsyncScheduler):
    """The scheduler of prefill engines."""
