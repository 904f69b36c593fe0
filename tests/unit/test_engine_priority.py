"""A turn's priority goes with it to both engines, and a turn that is taken up again goes first there, too."""

from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from kvshare.config import Base, Router
from kvshare.decoders import Decoder
from kvshare.errors import PrefixLost, ResumeReason
from kvshare.handoff import Handoff, PrefillResult, TokenChunk, TurnContext
from kvshare.metrics import Metrics
from kvshare.priority import PRIORITIES, RESUMED
from router.admission.decode_room import ReplicaCapacity
from router.pools.route import Route
from router.turn.orchestrator import Orchestrator


class Stream:
    """A decode call that loses its prefix, or generates one token."""

    def __init__(self, is_lost):
        self._is_lost = is_lost

    async def __aiter__(self):
        if self._is_lost:
            raise PrefixLost("preempted", reason=ResumeReason.PREEMPTED)
        yield TokenChunk([5], finish_reason="length")

    def cancel(self):
        pass


class Pool:
    """Of one replica, which tells `calls` what priority it was called with."""

    def __init__(self, name, calls, preemptions=0):
        self.name, self._calls, self._preemptions = name, calls, preemptions
        one = SimpleNamespace(id=f"{name}-1")
        methods = {"prefill": SimpleNamespace(remote=self._prefill), "decode": SimpleNamespace(remote=self._decode)}
        self.replicas = SimpleNamespace(
            usable=lambda: [one], succeeded=lambda replica: None, on=lambda replica: SimpleNamespace(**methods),
            streaming_on=lambda replica: SimpleNamespace(**methods),
        )  # fmt: skip

    async def _prefill(self, token_ids, request_id, *, priority, **_):
        self._calls.append((self.name, priority))
        return PrefillResult(Handoff(len(token_ids), "c", 20, {}), len(token_ids), 0, 0.1)

    def _decode(self, *_, priority, **__):
        self._calls.append((self.name, priority))
        self._preemptions -= 1
        return Stream(self._preemptions >= 0)

    def capacity(self):
        return {f"{self.name}-1": ReplicaCapacity(100, 8)}

    def overlaps(self, keys):
        return {}

    async def choose(self, tokens, keys, **_):
        return SimpleNamespace(replica=self.replicas.usable()[0], cached_tokens=0, missing_tokens=tokens, reason="only")

    @asynccontextmanager
    async def calling(self, placement, *work):
        yield


async def calls_of_a_turn(priority: int, preemptions: int = 0) -> list[tuple[str, int]]:
    calls = []
    route = Route(Pool("agents", calls, preemptions), Pool("prefill", calls))
    decoder = Decoder("planner", "agents", "prefillshare", "planner", "lora")
    orchestrator = Orchestrator(
        Router(), Base(model="m"), {"planner": decoder}, {"agents": route}, Metrics(CollectorRegistry())
    )
    sampling, context = SimpleNamespace(max_tokens=4, logprobs=None), TurnContext(priority=priority)
    turn = orchestrator.run("planner", list(range(100)), sampling, "r", context)
    assert [chunk.token_ids async for chunk in turn] == [[5]]
    return calls


@pytest.mark.parametrize("priority", [PRIORITIES[0], 0, 7, PRIORITIES[-1]])
async def test_prefill_and_decode_run_at_the_turns_priority(priority):
    assert await calls_of_a_turn(priority) == [("prefill", priority), ("agents", priority)]


async def test_a_turn_that_is_taken_up_again_goes_before_all_others():
    first, again = [("prefill", 7), ("agents", 7)], [("prefill", RESUMED), ("agents", RESUMED)]
    assert await calls_of_a_turn(7, preemptions=2) == [*first, *again, *again]
    assert min(PRIORITIES) > RESUMED
