"""Channels between engines and routers, over real sockets: who has the deployment's key is served, nobody else is."""

import threading
import time

import msgspec
import pytest
import zmq
from channels import HANDSHAKE, LIMIT_S, REPLAY, turned_away
from polling import until
from publisher import BLOCK, Engine, becomes, stored, tokens
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_scheduler, base_worker

from prefillshare.kvshare import channel_keys
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare_vllm.patches import nixl_handshakes
from prefillshare.router.pools import kv_follower
from prefillshare.router.pools.cache_index import BlockKeys, CacheIndex

pytestmark = pytest.mark.slow

TOKEN, OTHER_TOKEN = "a cluster's token", "another cluster's token"


@pytest.fixture(autouse=True)
def keyed(monkeypatch):
    """This process has the deployment's key."""
    monkeypatch.setenv(channel_keys.ENVIRONMENT, channel_keys.derive_secret(TOKEN))


@pytest.fixture
def strangers(monkeypatch):
    """Sets this process' keys to those of nobody, or of another deployment."""

    def become(token: str | None):
        monkeypatch.setenv(channel_keys.ENVIRONMENT, channel_keys.derive_secret(token) if token else "")

    return become


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.stop()


def test_every_process_derives_the_same_secret_from_the_token_and_it_does_not_tell_the_token():
    secret = channel_keys.derive_secret(TOKEN)
    assert secret == channel_keys.derive_secret(TOKEN) != channel_keys.derive_secret(OTHER_TOKEN)
    assert len(bytes.fromhex(secret)) == 32
    assert TOKEN.encode().hex() not in secret


def test_what_is_no_secret_is_refused(monkeypatch):
    monkeypatch.setenv(channel_keys.ENVIRONMENT, "no secret")
    with zmq.Context() as context, context.socket(zmq.SUB) as socket, pytest.raises(ConfigError, match="not hexadecimal"):
        channel_keys.protect(socket, server=False)


def test_without_a_secret_channels_are_plain(strangers):
    strangers(None)
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        assert channel_keys.protect(socket, server=True).mechanism == zmq.NULL


async def test_a_router_with_the_key_follows_an_engine(engine):
    assert engine._publisher._events.mechanism == engine._publisher._replays.mechanism == zmq.CURVE
    index = CacheIndex(BLOCK)
    engine.tell(stored(tokens(128), 1, salt="tenant"))
    await index.add("prefill", "one", engine.events)
    await becomes(index, BlockKeys(tokens(128), BLOCK, salt="tenant"), {"one": 128})
    engine.tell(stored(tokens(64, 7), 11))
    await becomes(index, BlockKeys(tokens(64, 7), BLOCK), {"one": 64})
    await index.close()


@pytest.mark.parametrize("token", [None, OTHER_TOKEN], ids=["no key", "another deployment's key"])
def test_events_and_their_replays_are_told_to_nobody_without_the_key(engine, strangers, token):
    engine.tell(stored(tokens(128), 1, salt="tenant"))
    strangers(token)
    assert turned_away(zmq.SUB, engine.events.endpoint)
    assert turned_away(zmq.DEALER, engine.events.replay_endpoint, REPLAY)


async def test_a_router_with_another_key_learns_nothing(engine, strangers, monkeypatch, caplog):
    monkeypatch.setattr(kv_follower, "STATE_TIMEOUT_S", 0.3)
    engine.tell(stored(tokens(128), 1))
    strangers(OTHER_TOKEN)
    index = CacheIndex(BLOCK)
    await index.add("prefill", "one", engine.events)

    async def asked_in_vain():
        return "does not tell what it has cached" in caplog.text

    await until(asked_in_vain)
    assert index.overlaps("prefill", BlockKeys(tokens(128), BLOCK)) == {}
    await index.close()


@pytest.fixture
def handshakes():
    """vLLM's own listener of an engine's handshakes: (host, port)."""
    nixl_handshakes.protect()
    nixl_handshakes.protect()  # the plugin may be loaded twice
    with zmq.Context() as context, context.socket(zmq.ROUTER) as free:
        port = free.bind_to_random_port("tcp://127.0.0.1")
    ready, stop = threading.Event(), threading.Event()
    answers = {(0, 0): b"where its memory lies"}
    listen = base_scheduler.NixlBaseConnectorScheduler._nixl_handshake_listener
    thread = threading.Thread(target=listen, args=(answers, ready, stop, "127.0.0.1", port))
    thread.start()
    assert ready.wait(LIMIT_S)
    yield f"tcp://127.0.0.1:{port}"
    stop.set()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_an_engine_with_the_key_shakes_hands(handshakes):
    with base_worker.zmq_ctx(zmq.REQ, handshakes) as engine:
        engine.setsockopt(zmq.RCVTIMEO, LIMIT_S * 1000)
        engine.send(HANDSHAKE)
        answer, clock = engine.recv_multipart()
    assert answer == b"where its memory lies"
    assert abs(msgspec.msgpack.decode(clock) - time.perf_counter()) < LIMIT_S


@pytest.mark.parametrize("token", [None, OTHER_TOKEN], ids=["no key", "another deployment's key"])
def test_a_handshake_without_the_key_gets_no_answer(handshakes, strangers, token):
    strangers(token)
    assert turned_away(zmq.REQ, handshakes, [HANDSHAKE])
