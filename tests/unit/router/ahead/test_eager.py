"""Eager prefill: when a response's KV is asked for, and when not."""

import asyncio

import pytest
from one_replica import OneReplica

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.handoff import PrefillResult
from prefillshare.kvshare.priority import BEHIND
from prefillshare.router.ahead.eager import EagerPrefill

BLOCK = 32


class Pool(OneReplica):
    """It computes when told to."""

    def __init__(self):
        super().__init__(warm=self._warm)
        self.asked, self.cancelled, self.finish = [], 0, asyncio.Event()

    def _warm(self, token_ids, request_id, cache_salt, priority):
        self.asked.append((len(token_ids), cache_salt, priority))
        return Call(self)


class Call:
    def __init__(self, pool):
        self._pool = pool

    def __await__(self):
        yield from self._pool.finish.wait().__await__()
        return PrefillResult(None, 100, 60, 0.1)

    def cancel(self):
        self._pool.cancelled += 1


@pytest.fixture
async def pool():
    return Pool()


@pytest.fixture
async def eager(pool, metrics):
    eager = EagerPrefill(lambda of, keys: pool, Base(model="m", block_size=BLOCK), metrics, limit=2, stride_tokens=100)
    yield eager
    await eager.stop()


def context(tokens):
    return lambda: list(range(tokens))


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def outcomes(metrics):
    return {s.labels["outcome"]: s.value for m in metrics["eager_prefills_total"].collect() for s in m.samples
            if s.name.endswith("_total")}  # fmt: skip


async def test_the_whole_context_is_asked_for_at_the_end_at_the_lowest_priority(eager, pool, metrics):
    eager.grew("s", 150, context(150), "salt", "agents", ended=True)
    await settle()
    pool.finish.set()
    await settle()
    assert pool.asked == [(150, "salt", BEHIND)]
    assert outcomes(metrics) == {"done": 1}
    assert metrics["eager_prefill_tokens_total"]._value.get() == 40


async def test_a_long_response_is_asked_for_stride_by_stride_while_it_streams(eager, pool):
    pool.finish.set()
    for tokens in range(500, 801):
        eager.grew("s", tokens, context(tokens), None, "agents", ended=False)
        await settle()
    assert [tokens for tokens, *_ in pool.asked] == [600, 700, 800]


async def test_much_that_is_missing_is_made_step_by_step(eager, pool):
    pool.missing = 250
    pool.finish.set()
    eager.grew("s", 400, context(400), None, "agents", ended=True)
    await settle()
    assert [tokens for tokens, *_ in pool.asked] == [250, 350, 400]


async def test_the_next_turn_cancels_what_still_runs(eager, pool, metrics):
    eager.grew("s", 150, context(150), None, "agents", ended=True)
    await settle()
    eager.cancel("s")
    await settle()
    assert pool.cancelled == 1
    assert outcomes(metrics) == {"cancelled": 1}


async def test_more_sessions_than_the_limit_are_dropped_and_counted(eager, pool, metrics):
    for session in "abcd":
        eager.grew(session, 150, context(150), None, "agents", ended=True)
    await settle()
    assert len(pool.asked) == 2
    assert outcomes(metrics) == {"dropped": 2}
    pool.finish.set()
    await settle()
    eager.grew("e", 150, context(150), None, "agents", ended=True)
    await settle()
    assert len(pool.asked) == 3


async def test_nothing_is_asked_for_that_is_cached_up_to_a_block(eager, pool, metrics):
    pool.missing = BLOCK - 1
    eager.grew("s", 150, context(150), None, "agents", ended=True)
    await settle()
    assert pool.asked == []
    assert outcomes(metrics) == {"needless": 1}


async def test_a_context_that_fills_the_models_length_is_left_alone(pool, metrics):
    base = Base(model="m", block_size=BLOCK, max_model_len=150)
    eager = EagerPrefill(lambda of, keys: pool, base, metrics, limit=2, stride_tokens=100)
    eager.grew("s", 150, context(150), None, "agents", ended=True)
    await settle()
    assert (pool.asked, outcomes(metrics)) == ([], {"needless": 1})
    eager.grew("s", 149, context(149), None, "agents", ended=True)
    await settle()
    assert [tokens for tokens, *_ in pool.asked] == [149]
    await eager.stop()


async def test_the_pool_is_the_one_that_is_there_now(metrics):
    """Pools come and go while the router runs."""
    now = []

    def maker(of, keys):
        assert of == "agents"
        if not now:
            raise Unavailable("none")
        return now[-1]

    eager = EagerPrefill(maker, Base(model="m", block_size=BLOCK), metrics, limit=2, stride_tokens=100)
    eager.grew("s", 150, context(150), None, "agents", ended=True)
    await settle()
    assert outcomes(metrics) == {"failed": 1}
    for _ in range(2):
        now.append(Pool())
        now[-1].finish.set()
        eager.grew("s", 150, context(150), None, "agents", ended=True)
        await settle()
        assert [tokens for tokens, *_ in now[-1].asked] == [150]
    assert outcomes(metrics) == {"failed": 1, "done": 2}
    await eager.stop()


async def test_one_that_raises_is_logged_with_its_session_and_counted(eager, pool, metrics, caplog):
    pool.finish.wait = lambda: asyncio.ensure_future(_raise(ZeroDivisionError("unforeseen")))
    eager.grew(("research", "mine"), 150, context(150), None, "agents", ended=True)
    await settle()
    await settle()
    assert outcomes(metrics) == {"failed": 1}
    assert metrics["background_failures_total"].labels("eager_prefill")._value.get() == 1
    assert "mine" in caplog.text
    assert "unforeseen" in caplog.text


async def _raise(error):
    raise error
