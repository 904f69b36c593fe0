"""Ready means that a turn would succeed now: the session store answers, and every pool has just taken a turn."""

import asyncio

import pytest
from polling import PATIENCE_S

from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import Overloaded, ReplicaLost
from prefillshare.router.redis_calls import RedisCalls
from prefillshare.router.sessions import MemorySessions, RedisSessions
from prefillshare.router.surfaces.readiness import PROBE_TTL_S, UNKNOWN, Readiness

POOLS = {"a": "one", "b": "one", "c": "two"}
DECODERS = {name: Decoder(name, pool, "prefillshare", name, "lora") for name, pool in POOLS.items()}


class Probe:
    """Turns that fail as told."""

    def __init__(self):
        self.taken, self.failing = [], {}

    async def __call__(self, decoder: str) -> None:
        self.taken.append(decoder)
        if error := self.failing.get(decoder):
            raise error


@pytest.fixture
def probe():
    return Probe()


def readiness(sessions, probe, draining=False):
    return Readiness(DECODERS, sessions, lambda: draining, probe).not_ready_because


async def test_a_turn_is_taken_on_each_pool_and_believed_for_a_while(probe):
    reason = readiness(MemorySessions(1, 1), probe)
    assert [await reason(), await reason()] == ["", ""]
    assert [DECODERS[name].pool for name in probe.taken] == ["one", "two"]


async def test_a_pool_that_fails_is_named_and_one_that_is_busy_is_ready(probe):
    reason = readiness(MemorySessions(1, 1), probe)
    probe.failing = {"b": Overloaded("full"), "c": ReplicaLost("it is gone")}
    assert await reason() == "pool two: it is gone"
    probe.failing.clear()
    assert await reason() == ""


async def test_one_at_a_time_tries_and_all_others_are_told_at_once_what_was_found(monkeypatch):
    now, goes_on, tried = 0.0, asyncio.Event(), []
    monkeypatch.setattr("prefillshare.router.clock.now", lambda: now)

    async def hangs(decoder: str) -> None:
        tried.append(decoder)
        await goes_on.wait()

    reason = readiness(MemorySessions(1, 1), hangs)
    first = asyncio.create_task(reason())
    await asyncio.sleep(0.01)
    assert {await reason() for _ in range(1000)} == {UNKNOWN}
    assert len(tried) == 1
    goes_on.set()
    assert await first == ""
    goes_on.clear()
    now = 6 * PROBE_TTL_S
    first = asyncio.create_task(reason())
    await asyncio.sleep(0.01)
    assert await reason() == "", "it was ready a moment ago"
    now = 7.5 * PROBE_TTL_S
    assert await reason() == "the turns that are tried have not ended for 15 s"
    first.cancel()  # who asked has left: the turns that it has had tried are not given up
    goes_on.set()
    await asyncio.sleep(0.01)
    assert (await reason(), len(tried)) == ("", 4)


async def test_a_router_that_stops_is_not_ready(probe):
    assert await readiness(MemorySessions(1, 1), probe, draining=True)() == "the router is stopping"
    assert probe.taken == []


@pytest.mark.parametrize(("outage", "reason"), [("kill", "it cannot be reached"), ("pause", "no answer within 0.5 s")])
async def test_without_its_session_store_a_router_is_not_ready_and_says_so_at_once(probe, own_redis_server, outage, reason):
    server = own_redis_server()
    sessions = RedisSessions(RedisCalls(server.url, "session store"), 5, 60, timeout_s=0.5)
    not_ready_because = readiness(sessions, probe)
    assert await not_ready_because() == ""
    getattr(server, outage)()
    async with asyncio.timeout(PATIENCE_S):
        told = await not_ready_because()
    assert told.startswith(f"the session store: {reason}")
    assert "redis" not in told
    assert str(server.port) not in told
    {"kill": server.start, "pause": server.resume}[outage]()
    assert await not_ready_because() == ""
    await sessions.close()
