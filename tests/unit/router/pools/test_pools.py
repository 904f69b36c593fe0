"""A pool: the choice among replicas that come, go and are given work."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError

from prefillshare.kvshare.errors import InvalidInput, PrefixLost, ReplicaLost, ResumeReason, Unavailable
from prefillshare.kvshare.replica_info import KVEvents, ReplicaInfo
from prefillshare.router.pools.cache_index import BlockKeys
from prefillshare.router.pools.health import Health
from prefillshare.router.pools.placement import POLICIES
from prefillshare.router.pools.pool import Pool
from prefillshare.router.pools.replica import Replica
from prefillshare.router.pools.replicas import ReplicaSet

BLOCK = 32


def tokens(n, salt=0):
    return [(7 + 13 * i + 101 * salt) % 40000 for i in range(n)]


class Index:
    """Says what it was told to."""

    block_size = BLOCK

    def __init__(self):
        self.holds = {}

    def overlaps(self, pool, keys):
        return self.holds


@pytest.fixture
async def pool():
    handle = SimpleNamespace(options=lambda **_: handle)
    replicas = ReplicaSet("prefill", handle, wedged_after_s=5)
    pool = Pool(replicas, Index(), POLICIES["prefix_aware"][0], wait_s=0.05)
    for name in "ab":
        join(pool, name)
    return pool


def join(pool, name):
    pool.replicas.members[name] = Replica(ReplicaInfo(name, KVEvents("", None), 100, BLOCK, 8), Health())
    pool.replicas.note_change()


async def choose(pool, prompt, **kw):
    return await pool.choose(len(prompt), BlockKeys(prompt, BLOCK), **kw)


async def test_the_holder_is_chosen_and_what_it_lacks_is_told(pool):
    pool._index.holds = {"b": 96}
    placement = await choose(pool, tokens(130))
    assert (placement.replica.id, placement.cached_tokens, placement.missing_tokens) == ("b", 96, 34)


async def test_prompts_that_share_a_beginning_go_where_it_is_being_made(pool):
    first = tokens(300)
    placement = await choose(pool, first)
    with pool.computing(placement, 100, BlockKeys(first, BLOCK)):
        assert placement.replica.queued_tokens == 100
        sharing = await choose(pool, first[:256] + tokens(40, salt=9))
        other = await choose(pool, tokens(300, salt=4))
    assert sharing.replica is placement.replica
    assert sharing.cached_tokens == 256
    assert other.replica is not placement.replica


async def test_a_replica_that_failed_this_turn_is_taken_only_if_there_is_no_other(pool):
    assert (await choose(pool, tokens(50), without={"a"})).replica.id == "b"
    del pool.replicas.members["b"]
    pool.replicas.note_change()
    assert (await choose(pool, tokens(50), without={"a"})).replica.id == "a"


async def test_a_pool_without_replicas_is_waited_for_and_then_unavailable(pool):
    pool.replicas.members.clear()
    pool.replicas.note_change()
    with pytest.raises(Unavailable, match=r"no replica of prefill has been ready for 0\.05 s"):
        await choose(pool, tokens(50))
    asyncio.get_running_loop().call_later(0.01, join, pool, "c")
    assert (await choose(pool, tokens(50))).replica.id == "c"


@pytest.mark.parametrize(
    ("raised", "reason"),
    [(RayError("died"), ResumeReason.GONE), (Unavailable("says it cannot"), ResumeReason.UNAVAILABLE),
     (asyncio.CancelledError(), ResumeReason.GONE)],
)  # fmt: skip
async def test_what_is_the_replicas_fault_is_a_lost_replica_and_counts_against_it(pool, raised, reason):
    for _ in range(Health.FAILURES_TO_EJECT):
        placement = await choose(pool, tokens(50), without={"b"})
        with pytest.raises(ReplicaLost) as lost:
            async with pool.calling(placement):
                raise raised
        assert lost.value.reason is reason
    assert [r.id for r in pool.replicas.usable()] == ["b"]
    assert placement.replica.active == 0


@pytest.mark.parametrize("raised", [InvalidInput("wrong"), PrefixLost("preempted", reason=ResumeReason.PREEMPTED)])
async def test_what_is_not_the_replicas_fault_passes_and_does_not_count(pool, raised):
    placement = await choose(pool, tokens(50))
    with pytest.raises(type(raised)):
        async with pool.calling(placement):
            raise raised
    assert placement.replica.health._failures == 0


async def test_calls_on_a_replica_found_wedged_end_at_once(pool):
    placement = await choose(pool, tokens(50))

    async def call():
        async with pool.calling(placement):
            await asyncio.sleep(5)

    calls = [asyncio.create_task(call()) for _ in range(3)]
    await asyncio.sleep(0)
    for _ in range(4):  # found out again while the calls are ending
        pool.replicas.failed(placement.replica.id, ResumeReason.WEDGED)
        await asyncio.sleep(0)
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert [(type(e), e.reason) for e in ended] == [(ReplicaLost, ResumeReason.WEDGED)] * 3


async def test_a_cancelled_turn_stays_cancelled_and_blames_nobody(pool):
    placement = await choose(pool, tokens(50))

    async def turn():
        async with pool.calling(placement):
            await asyncio.sleep(5)

    task = asyncio.create_task(turn())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert placement.replica.health._failures == 0


async def test_where_all_are_ejected_those_that_answer_are_used_and_those_that_hang_are_not(pool):
    for _ in range(Health.FAILURES_TO_EJECT):
        pool.replicas.failed("a", ResumeReason.UNAVAILABLE)
    pool.replicas.failed("b", ResumeReason.WEDGED)
    assert [r.id for r in pool.replicas.usable()] == ["a"]
    pool.replicas.failed("a", ResumeReason.WEDGED)
    assert pool.replicas.usable() == []
