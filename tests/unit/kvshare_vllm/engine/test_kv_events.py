"""The index against a real publisher over ZMQ: evictions, late joiners, missed events, restarts, tenants."""

import msgspec
import pytest
import zmq
from polling import until
from publisher import BLOCK, Engine, becomes, keeps, kept, removed, stored, tokens
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved

from prefillshare.kvshare_vllm.engine import kv_events
from prefillshare.router.pools import kv_follower
from prefillshare.router.pools.cache_index import BlockKeys, CacheIndex


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.stop()


@pytest.fixture
async def follow(engine):
    """An index that has just begun to follow the engine."""
    opened = []

    async def begin(*on_given_up):
        opened.append(index := CacheIndex(BLOCK, *on_given_up))
        await index.add("prefill", "one", engine.events)
        return index

    yield begin
    for index in opened:
        await index.close()


async def test_the_index_follows_what_is_stored_and_evicted(engine, follow):
    index = await follow()
    prompt = BlockKeys(tokens(200), BLOCK)
    engine.tell(stored(tokens(128), 1))
    await becomes(index, prompt, {"one": 128})
    engine.tell(stored(tokens(192)[128:], 5, parent=4))
    await becomes(index, prompt, {"one": 192})
    engine.tell(removed(6))
    await becomes(index, prompt, {"one": 160})
    engine.tell(AllBlocksCleared())
    await becomes(index, prompt, {})


async def test_a_router_that_joins_late_learns_the_state_of_an_idle_engine(engine, follow):
    engine.tell(stored(tokens(128), 1))
    for n in range(30):
        engine.tell(stored(tokens(64, 10 + n), 100 + 2 * n), removed(100 + 2 * n, 101 + 2 * n))
    index = await follow()
    await becomes(index, BlockKeys(tokens(200), BLOCK), {"one": 128}, timeout_s=2)
    assert index.overlaps("prefill", BlockKeys(tokens(64, 12), BLOCK)) == {}


async def test_blocks_evicted_while_a_router_joins_are_not_taken_for_cached(engine, follow):
    engine.tell(stored(tokens(128), 1))
    for n in range(8):
        passing = tokens(64, 50 + n)
        engine.tell(stored(passing, 1000 + 10 * n))
        index = await follow()
        for _ in range(5):
            engine.tell(removed(1000 + 10 * n, 1001 + 10 * n))
            engine.tell(stored(passing, 1000 + 10 * n))
        engine.tell(removed(1000 + 10 * n, 1001 + 10 * n))
        await becomes(index, BlockKeys(tokens(200), BLOCK), {"one": 128})
        await becomes(index, BlockKeys(passing, BLOCK), {})
        await index.close()


async def test_an_engine_that_restarts_on_its_address_is_known_by_its_new_state(engine, follow):
    index = await follow()
    engine.tell(stored(tokens(128), 1))
    await becomes(index, BlockKeys(tokens(128), BLOCK), {"one": 128})
    engine.stop()
    engine.start()
    engine.tell(stored(tokens(64, 7), 1))
    await becomes(index, BlockKeys(tokens(64, 7), BLOCK), {"one": 64})
    assert index.overlaps("prefill", BlockKeys(tokens(128), BLOCK)) == {}


async def test_a_router_knows_what_a_replica_keeps_and_what_it_has_given_up(engine, follow):
    given_up = []
    engine.tell(stored(tokens(128), 1), kept("a", 128, 4), kept("b", 64, 4))
    index = await follow(lambda *told: given_up.append(told))
    await keeps(index, {"a": 128, "b": 64})
    assert index.kept("prefill")["one"].blocks == 4
    engine.tell(kept("a", 96, 3, given_up=1, why="pressure"), kept("b", 0, 3, why="let_go"))
    await keeps(index, {"a": 96})
    assert index.kept("prefill")["one"].blocks == 3
    assert given_up == [("prefill", "pressure", 1)]
    engine.tell(AllBlocksCleared())
    await keeps(index, {})
    engine.tell(kept("c", 32, 1))
    await keeps(await follow(), {"c": 32})
    await index.remove("prefill", "one")
    assert "one" not in index.kept("prefill")


async def test_a_replica_that_has_left_holds_nothing_and_may_come_back(engine, follow):
    index = await follow()
    engine.tell(stored(tokens(128), 1))
    prompt = BlockKeys(tokens(128), BLOCK)
    await becomes(index, prompt, {"one": 128})
    await index.remove("prefill", "one")
    assert index.overlaps("prefill", prompt) == {}
    await index.add("prefill", "one", engine.events)
    await becomes(index, prompt, {"one": 128})


async def test_tenants_blocks_are_found_under_their_own_salt_only(engine, follow):
    index = await follow()
    ids = tokens(256)
    engine.tell(stored(ids[:128], 1, salt="tenant"))
    engine.tell(stored(ids[128:], 5, parent=4, salt="tenant"))  # the salt stands in the first block's key only
    await becomes(index, BlockKeys(ids, BLOCK, salt="tenant"), {"one": 256})
    assert index.overlaps("prefill", BlockKeys(ids, BLOCK)) == {}
    assert index.overlaps("prefill", BlockKeys(ids, BLOCK, salt="other")) == {}


async def test_an_adapters_blocks_are_anybodys_where_its_name_is_not_in_their_key(engine, follow):
    index = await follow()
    engine.tell(stored(tokens(128), 1, lora="planner"))
    engine.tell(stored(tokens(128, 3), 11, lora="planner", lora_in_key=True))
    await becomes(index, BlockKeys(tokens(128), BLOCK), {"one": 128})
    await becomes(index, BlockKeys(tokens(128, 3), BLOCK, adapter="planner"), {"one": 128})
    assert index.overlaps("prefill", BlockKeys(tokens(128, 3), BLOCK)) == {}


async def test_pools_are_asked_apart(engine, follow):
    index = await follow()
    engine.tell(stored(tokens(128), 1))
    await becomes(index, BlockKeys(tokens(128), BLOCK), {"one": 128})
    assert index.overlaps("decode", BlockKeys(tokens(128), BLOCK)) == {}


async def test_a_large_state_is_told_in_parts(engine, follow, monkeypatch):
    monkeypatch.setattr(kv_events, "STATE_BLOCKS", 3)
    engine.tell(stored(tokens(320), 1), stored(tokens(320, 5), 101, salt="tenant"))
    index = await follow()
    await becomes(index, BlockKeys(tokens(320), BLOCK), {"one": 320})
    await becomes(index, BlockKeys(tokens(320, 5), BLOCK, salt="tenant"), {"one": 320})


async def test_blocks_that_follow_each_other_are_one_event(engine):
    with zmq.Context.instance().socket(zmq.SUB) as stream:
        stream.subscribe(b"")
        stream.connect(engine.events.endpoint)
        stream.recv_multipart()  # a heartbeat: connected
        engine.tell(stored(tokens(128), 1))
        while not (events := msgspec.msgpack.decode(stream.recv_multipart()[2])[1]):
            pass
    assert [e["block_hashes"] for e in events] == [[1, 2, 3, 4]]
    assert events[0]["token_ids"] == tokens(128)


async def test_a_key_that_several_blocks_hold_is_cached_until_the_last_is_gone(engine, follow):
    index, prompt = await follow(), BlockKeys(tokens(128), BLOCK)
    engine.tell(stored(tokens(128), 1), stored(tokens(128), 1))
    await becomes(index, prompt, {"one": 128})
    engine.tell(removed(4), stored(tokens(64, 9), 50))
    await becomes(index, BlockKeys(tokens(64, 9), BLOCK), {"one": 64})
    assert index.overlaps("prefill", prompt) == {"one": 128}
    late = await follow()
    await becomes(late, prompt, {"one": 128})
    engine.tell(removed(4))
    for one in (index, late):
        await becomes(one, prompt, {"one": 96})


async def test_blocks_the_index_does_not_know_do_not_end_the_following(engine, follow):
    index = await follow()
    engine._publisher._held.clear()
    engine.tell(stored(tokens(64), 5, parent=77), removed(5), stored(tokens(128, 2), 11))
    await becomes(index, BlockKeys(tokens(128, 2), BLOCK), {"one": 128})
    index._pools["prefill"].apply(index._pools["prefill"].open("one"), [BlockRemoved(block_hashes=[999], medium="GPU")])
    assert index.overlaps("prefill", BlockKeys(tokens(128, 2), BLOCK)) == {"one": 128}


async def test_what_is_no_event_is_got_over(engine, follow, monkeypatch, caplog):
    monkeypatch.setattr(kv_follower, "RETRY_S", 0.05)
    index = await follow()
    engine.tell(stored(tokens(128), 1))
    await becomes(index, BlockKeys(tokens(128), BLOCK), {"one": 128})
    monkeypatch.setattr(engine._publisher, "_encode", lambda *_: b"nonsense")
    engine.tell(stored(tokens(64, 3), 20))

    async def noticed():
        return "could not be followed" in caplog.text

    await until(noticed)
    monkeypatch.undo()
    await becomes(index, BlockKeys(tokens(64, 3), BLOCK), {"one": 64})


async def test_blocks_that_were_offloaded_do_not_count(engine, follow):
    index = await follow()
    offloaded = stored(tokens(128), 1)
    offloaded.medium = "CPU"
    engine.tell(offloaded, stored(tokens(64, 3), 20))
    await becomes(index, BlockKeys(tokens(64, 3), BLOCK), {"one": 64})
    assert index.overlaps("prefill", BlockKeys(tokens(128), BLOCK)) == {}


async def test_a_publisher_waits_for_what_there_is_to_do_and_looks_for_nothing(monkeypatch):
    waits = []

    class Poller(zmq.Poller):
        def poll(self, timeout=None):
            waits.append(timeout)
            return super().poll(timeout)

    monkeypatch.setattr(kv_events.zmq, "Poller", Poller)
    monkeypatch.setattr(kv_events, "HEARTBEAT_S", 600.0)
    engine, index, prompt = Engine(), CacheIndex(BLOCK), BlockKeys(tokens(200), BLOCK)
    engine.tell(stored(tokens(128), 1))
    await index.add("prefill", "one", engine.events)  # it asks for the state, and no heartbeat is due for minutes
    await becomes(index, prompt, {"one": 128})
    await index.close()
    engine.stop()
    assert min(waits[1:]) > 1000 * 590
