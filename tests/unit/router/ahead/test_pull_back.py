"""Pull-back: what a decode engine lends is pulled where that pays, given back where not, and never waited for in vain."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from one_replica import OneReplica
from polling import until

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.handoff import Handoff, PrefillResult
from prefillshare.router.ahead.pull_back import PullBack

BLOCK = 32


class Pool(OneReplica):
    """It pulls all but the last token, when told to."""

    def __init__(self):
        super().__init__(pull=_task(self._pull), release=_task(self._release))
        self.pulled, self.released, self.error = [], 0, None
        self.gate = asyncio.Event()
        self.gate.set()

    async def _pull(self, token_ids, lent, request_id, cache_salt):
        await self.gate.wait()
        if self.error:
            raise self.error
        self.pulled.append((len(token_ids), cache_salt))
        return PrefillResult(None, len(token_ids), len(token_ids) - 1, 0.1)

    async def _release(self, lent, request_id):
        self.released += 1


def _task(function):
    return lambda *args, **kwargs: asyncio.ensure_future(function(*args, **kwargs))


@pytest.fixture
async def pool():
    return Pool()


@pytest.fixture
async def pull_back(pool, metrics):
    async with running(pool, metrics) as made:
        yield made


@asynccontextmanager
async def running(pool, metrics, when="cheaper"):
    base = Base(model="m", block_size=BLOCK, max_model_len=4096)
    made = PullBack(lambda: pool, base, metrics, when=when, limit=2, compute_s=lambda: made.known_compute_s)
    made.known_compute_s = None
    yield made
    await made.stop()


def loan(tokens: int, lease_s: float = 60) -> Handoff:
    return Handoff(tokens, "contract", lease_s, {})


async def counts(metrics, outcome: str, number: int) -> None:
    async def counted():
        return metrics["pull_backs_total"].labels(outcome)._value.get() == number

    async with asyncio.timeout(2):
        await until(counted)


async def given_back(pool, number: int) -> None:
    async def released():
        return pool.released == number

    async with asyncio.timeout(2):
        await until(released)


async def test_all_but_the_last_token_of_a_context_is_pulled(pull_back, pool, metrics):
    pull_back.lent("s", list(range(155)), loan(154), "salt")
    await counts(metrics, "done", 1)
    assert pool.pulled == [(155, "salt")]
    assert metrics["pulled_back_tokens_total"]._value.get() == 89


async def test_a_context_longer_than_the_loan_is_cut(pull_back, pool, metrics):
    pull_back.lent("s", list(range(170)), loan(154), None)
    await counts(metrics, "done", 1)
    assert pool.pulled == [(155, None)]


async def test_less_than_a_block_is_given_back(pull_back, pool, metrics):
    pool.missing = BLOCK - 1
    pull_back.lent("s", list(range(95)), loan(94), None)
    await counts(metrics, "needless", 1)
    await given_back(pool, 1)
    assert not pool.pulled


async def test_what_is_computed_faster_is_not_pulled(pull_back, pool, metrics):
    pull_back.known_compute_s = 1e-12
    for number in (1, 2):  # the first time engines meet; the second says how long a pull takes
        pull_back.lent("s", list(range(155)), loan(154), None)
        await counts(metrics, "done", number)
    made = []
    pull_back.lent("s", list(range(155)), loan(154), None, otherwise=lambda: made.append(1))
    await counts(metrics, "declined", 1)
    assert made
    pull_back.known_compute_s = 10.0
    pull_back.lent("s", list(range(155)), loan(154), None)
    await counts(metrics, "done", 3)
    await given_back(pool, 1)


async def test_what_is_computed_faster_is_pulled_where_the_prefill_pool_is_to_be_spared(pool, metrics):
    async with running(pool, metrics, "always") as always:
        always.known_compute_s = 1e-12
        for number in (1, 2, 3):
            always.lent("s", list(range(155)), loan(154), None)
            await counts(metrics, "done", number)


async def test_what_was_measured_long_ago_counts_no_more(pull_back, pool, metrics, monkeypatch):
    pull_back.known_compute_s = 1e-12
    for number in (1, 2):
        pull_back.lent("s", list(range(155)), loan(154), None)
        await counts(metrics, "done", number)
    monkeypatch.setattr("prefillshare.router.ahead.pull_back.MEMORY_S", 0.0)
    pull_back.lent("s", list(range(155)), loan(154), None)
    await counts(metrics, "done", 3)


async def test_a_loan_that_nobody_wants_is_given_back(pull_back, pool, metrics):
    pull_back.give_back(loan(154))
    await counts(metrics, "unwanted", 1)
    await given_back(pool, 1)
    assert not pool.pulled


async def test_a_context_that_fills_the_model_is_not_pulled(pull_back, pool, metrics):
    pull_back.lent("s", list(range(4096)), loan(4095), None)
    await counts(metrics, "needless", 1)


async def test_more_at_once_than_the_limit_are_given_back(pull_back, pool, metrics):
    pool.gate.clear()
    for number in range(4):
        pull_back.lent(number, list(range(155)), loan(154), None)
    await counts(metrics, "dropped", 2)
    pool.gate.set()
    await counts(metrics, "done", 2)
    await given_back(pool, 2)


async def test_a_pull_that_fails_is_counted_and_does_no_more_harm(pull_back, pool, metrics):
    pool.error = Unavailable("no")
    pull_back.lent("s", list(range(155)), loan(154), None)
    await counts(metrics, "failed", 1)


async def test_a_pull_that_hangs_ends_with_the_lease(pull_back, pool, metrics):
    pool.gate.clear()
    pull_back.lent("s", list(range(155)), loan(154, lease_s=0.1), None)
    await counts(metrics, "failed", 1)


async def test_the_next_turn_waits_for_the_pull(pull_back, pool, metrics):
    await pull_back.settled("s")
    pool.gate.clear()
    pull_back.lent("s", list(range(155)), loan(154), None)
    waiting = asyncio.create_task(pull_back.settled("s"))
    await asyncio.wait_for(pull_back.settled("another"), 1)
    await asyncio.sleep(0.05)
    assert not waiting.done()
    pool.gate.set()
    await asyncio.wait_for(waiting, 1)
    assert pool.pulled


async def test_a_pull_that_takes_longer_than_computing_is_ended_for_the_next_turn(pull_back, pool, metrics):
    pull_back.known_compute_s = 1e-4
    pool.gate.clear()
    pull_back.lent("s", list(range(155)), loan(154), None)
    await asyncio.wait_for(pull_back.settled("s"), 1)
    await counts(metrics, "failed", 1)
    assert not pool.pulled
    await asyncio.wait_for(pull_back.settled("s"), 1)
