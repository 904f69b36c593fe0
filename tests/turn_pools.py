"""Pools of one replica each, as far as a turn calls them, and a turn over them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from types import SimpleNamespace

from prometheus_client import CollectorRegistry

from kvshare.caller import Caller
from kvshare.config import Base, Router
from kvshare.decoders import Decoder
from kvshare.handoff import Handoff, PrefillResult, TokenChunk
from kvshare.metrics import Metrics
from kvshare_vllm.surface.turn_call import TurnCall
from router.admission.decode_room import ReplicaCapacity
from router.pools.route import Route
from router.turn.orchestrator import Orchestrator
from router.turn.terms import Terms


class Stream:
    """A decode call. `chunks()`: what it yields or raises."""

    def __init__(self, chunks: Callable[[], AsyncIterator[TokenChunk]]):
        self._chunks, self.cancelled = chunks, False

    def __aiter__(self):
        return self._chunks()

    def cancel(self):
        self.cancelled = True


class Pool:
    """`calls`: gets (pool, method, what it was asked) of each call."""

    def __init__(self, name: str, calls: list, decoding: Callable[[], Stream] | None = None):
        self.name, self._calls, self._decoding = name, calls, decoding
        one = SimpleNamespace(id=f"{name}-1")
        methods = SimpleNamespace(
            prefill=SimpleNamespace(remote=self._prefill),
            decode=SimpleNamespace(remote=self._decode),
            give_up=SimpleNamespace(remote=self._give_up),
        )
        self.replicas = SimpleNamespace(
            usable=lambda: [one],
            succeeded=lambda replica: None,
            on=lambda replica: methods,
            streaming_on=lambda replica: methods,
        )

    async def _prefill(self, token_ids, request_id, **asked):
        self._calls.append((self.name, "prefill", asked))
        return PrefillResult(Handoff(len(token_ids), "c", 20, {}), len(token_ids), 0, 0.1)

    def _decode(self, request):
        self._calls.append((self.name, "decode", asdict(request)))
        return self._decoding()

    async def _give_up(self, handoff, request_id):
        self._calls.append((self.name, "give up", request_id))

    def capacity(self):
        return {f"{self.name}-1": ReplicaCapacity(100, 8)}

    def overlaps(self, keys):
        return {}

    async def choose(self, tokens, keys, **_):
        return SimpleNamespace(replica=self.replicas.usable()[0], cached_tokens=0, missing_tokens=tokens, reason="only")

    @asynccontextmanager
    async def calling(self, placement, *work):
        yield


def begin(calls: list, decoding: Callable[[], Stream], priority: int = 0, **terms) -> AsyncIterator[TokenChunk]:
    """A turn of request "r"."""
    route = Route(Pool("agents", calls, decoding), Pool("prefill", calls))
    decoder = Decoder("planner", "agents", "prefillshare", "planner", "lora")
    orchestrator = Orchestrator(
        Router(), Base(model="m"), {"planner": decoder}, {"agents": route}, Metrics(CollectorRegistry())
    )
    sampling = SimpleNamespace(max_tokens=4, logprobs=None)
    call = TurnCall("planner", list(range(100)), sampling, "r", Caller(priority=priority), terms=Terms(**terms))
    return orchestrator.turn(call).chunks()
