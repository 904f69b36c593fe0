"""Who is there, and who has an engine: known within two seconds."""

import asyncio
from types import SimpleNamespace

import pytest
from polling import until
from ray.serve import context as serve_context

from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.replica_info import KVEvents, ReplicaInfo, ReplicaStats
from prefillshare.router.pools import replicas as replicas_module
from prefillshare.router.pools.pinned import MEMBERS, WATCHERS, tell
from prefillshare.router.pools.replicas import ReplicaSet

DEPLOYMENT = ("app", "prefill")
KNOWN_WITHIN_S = 2.0
#: Replicas that live on without an engine.
DEAD: set[str] = set()
#: Replica -> adapters it has loaded, or why not; of those that are not here, none.
ADAPTERS: dict[str, dict[str, str]] = {}


class Handle:
    """Answers for every replica; `options(session_id=...)` names the one that is asked."""

    is_initialized, deployment_id = True, SimpleNamespace(app_name="app", name="prefill")

    def __init__(self, replica: str = ""):
        self._replica = replica
        self.describe = SimpleNamespace(remote=self._describe)
        self.stats = SimpleNamespace(remote=self._stats)
        self.adapters = SimpleNamespace(remote=self._adapters)

    def options(self, session_id: str = "", **_):
        return Handle(session_id)

    async def _describe(self):
        return ReplicaInfo(self._replica, KVEvents("", None), 100, 32, 8)

    async def _stats(self):
        if self._replica in DEAD:
            raise Unavailable("the engine has died")
        return ReplicaStats()

    async def _adapters(self):
        if self._replica in DEAD:
            raise Unavailable("the engine has died")
        return ADAPTERS.get(self._replica, {})


@pytest.fixture
async def replicas():
    told = []

    async def listener(replica, info):
        told.append((replica, info is not None))

    replicas = ReplicaSet("prefill", Handle(), wedged_after_s=5)
    replicas.joined.listener, replicas.told = listener, told
    tell(DEPLOYMENT, {"first"})
    await replicas.start(timeout_s=KNOWN_WITHIN_S)
    yield replicas
    await replicas.stop()
    del MEMBERS[DEPLOYMENT]
    DEAD.clear()
    ADAPTERS.clear()


async def becomes_known(replicas, names: set[str]) -> None:
    async def known():
        return set(replicas.members) == names

    async with asyncio.timeout(KNOWN_WITHIN_S):
        await until(known)


async def test_replicas_that_join_and_leave_are_known_within_two_seconds(replicas):
    tell(DEPLOYMENT, {"first", "second"})
    await becomes_known(replicas, {"first", "second"})
    tell(DEPLOYMENT, {"second"})
    await becomes_known(replicas, {"second"})
    assert [r.id for r in replicas.usable()] == ["second"]
    assert replicas.told == [("first", True), ("second", True), ("first", False)]


async def test_who_comes_and_goes_is_told_and_not_looked_for(monkeypatch):
    monkeypatch.setattr(replicas_module, "STATS_S", 600)  # else it would be seen when they are asked how they fare
    replicas = ReplicaSet("prefill", Handle(), wedged_after_s=5)
    tell(DEPLOYMENT, {"first"})
    await replicas.start(timeout_s=KNOWN_WITHIN_S)
    await asyncio.to_thread(tell, DEPLOYMENT, {"first", "second"})  # as Serve does, from a thread of its own
    await becomes_known(replicas, {"first", "second"})
    await asyncio.to_thread(tell, DEPLOYMENT, {"second"})
    await becomes_known(replicas, {"second"})
    await replicas.stop()
    del MEMBERS[DEPLOYMENT]
    assert DEPLOYMENT not in WATCHERS


async def test_a_replica_whose_engine_has_died_gets_no_work_within_two_seconds(replicas):
    tell(DEPLOYMENT, {"first", "second"})
    await becomes_known(replicas, {"first", "second"})
    DEAD.add("first")

    async def left_out():
        return [r.id for r in replicas.usable()] == ["second"]

    async with asyncio.timeout(KNOWN_WITHIN_S):
        await until(left_out)


async def test_adapters_are_waited_for_on_all_that_answer(replicas):
    tell(DEPLOYMENT, {"first", "second", "third"})
    await becomes_known(replicas, {"first", "second", "third"})
    DEAD.add("third")
    ADAPTERS["first"] = {"coder": "", "planner": ""}
    waiting = asyncio.create_task(replicas.adapter_problems({"coder"}, 10))
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done
    ADAPTERS["second"] = {"coder": ""}
    async with asyncio.timeout(KNOWN_WITHIN_S):
        assert await waiting == {}


async def test_an_adapter_that_one_replica_could_not_load_is_known_at_once_with_the_reason(replicas):
    tell(DEPLOYMENT, {"first", "second"})
    await becomes_known(replicas, {"first", "second"})
    ADAPTERS["first"] = {"coder": "", "planner": "", "other": "of another pool"}
    ADAPTERS["second"] = {"coder": "", "planner": "vLLM does not yet support DoRA."}
    async with asyncio.timeout(KNOWN_WITHIN_S):
        assert await replicas.adapter_problems({"coder", "planner"}, 10) == {"planner": "vLLM does not yet support DoRA."}


@pytest.mark.slow
async def test_replicas_that_are_away_while_they_take_over_a_change_are_waited_for(replicas):
    """As Serve tells it: gone, and back with what has come of it."""
    MEMBERS[DEPLOYMENT] = frozenset()
    await becomes_known(replicas, set())
    asked = [asyncio.create_task(replicas.adapter_problems({"coder"}, 10, count)) for count in (1, 2)]
    ADAPTERS.update(first={"coder": ""}, second={"coder": "why"})
    MEMBERS[DEPLOYMENT] = frozenset({"first"})
    async with asyncio.timeout(KNOWN_WITHIN_S):
        assert await asked[0] == {}
    assert not asked[1].done()
    MEMBERS[DEPLOYMENT] = frozenset({"first", "second"})
    async with asyncio.timeout(KNOWN_WITHIN_S):
        assert await asked[1] == {"coder": "why"}


async def test_an_adapter_that_a_replica_never_loads_is_a_problem_when_the_time_is_up(replicas):
    ADAPTERS["first"] = {"coder": ""}
    assert await replicas.adapter_problems({"coder", "planner"}, 0.2) == {"planner": "it is not loaded after 0.2 s"}


async def test_calls_belong_to_no_request_of_serves_so_that_only_their_caller_ends_them():
    seen = []

    class Method:
        def remote(self, *args, **kwargs):
            seen.append((args, kwargs, serve_context._get_serve_request_context()))
            return "the answer"

    handle = SimpleNamespace(options=lambda **_: handle, prefill=Method(), decode=Method())
    replicas = ReplicaSet("prefill", handle, wedged_after_s=5)
    ours = serve_context._RequestContext(route="/", request_id="r", _internal_request_id="of Serve")
    serve_context._serve_request_context.set(ours)
    assert replicas.on("first").prefill.remote([1], adapter="a") == "the answer"
    assert replicas.streaming_on("first").decode.remote([2]) == "the answer"
    assert [(args, kwargs) for args, kwargs, _ in seen] == [(([1],), {"adapter": "a"}), (([2],), {})]
    assert [(context.request_id, context._internal_request_id) for *_, context in seen] == [("r", "")] * 2
    assert serve_context._get_serve_request_context() is ours
