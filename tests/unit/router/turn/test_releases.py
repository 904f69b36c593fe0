"""What a prefill leases is released where the turn that asked for it has ended: also if the two happen at the same time."""

import asyncio
from functools import partial
from types import SimpleNamespace

import pytest
from polling import until
from prometheus_client import CollectorRegistry

from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.handoff import Handoff, PrefillResult
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.turn import releases
from prefillshare.router.turn.releases import Releases


class Call:
    """Of a replica: it answers when `answer` is set."""

    def __init__(self):
        self.answer, self.cancelled = asyncio.get_running_loop().create_future(), False

    def __await__(self):
        return self.answer.__await__()

    def cancel(self):
        self.cancelled = True
        self.answer.cancel()


class Decode:
    """A pool whose replica is told what nobody will read."""

    def __init__(self):
        self.released = []
        self.given_up = []
        one = SimpleNamespace(
            release=SimpleNamespace(remote=partial(self._told, self.released)),
            give_up=SimpleNamespace(remote=partial(self._told, self.given_up)),
        )
        self.replicas = SimpleNamespace(usable=lambda: [SimpleNamespace(id="one")], on={"one": one}.get)

    async def _told(self, of, handoff, request_id):
        of.append((handoff.transfer["at"], request_id))


def result() -> PrefillResult:
    return PrefillResult(Handoff(3, "c", 20, {"at": 7}), 4, 0, 0.1)


@pytest.fixture
async def asked():
    """(the call, the decode pool, a turn's task that waits for the call)"""
    call, decode = Call(), Decode()
    behind = Releases(Metrics(CollectorRegistry()))
    turn = asyncio.create_task(behind.answered(call, decode, "r"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    yield call, decode, turn
    await behind._background.stop()


async def is_cancelled(turn) -> None:
    with pytest.raises(asyncio.CancelledError):
        await turn


async def test_a_turn_gets_its_prefills_answer(asked):
    call, decode, turn = asked
    call.answer.set_result(result())
    assert await turn == result()
    assert (decode.released, call.cancelled) == ([], False)


async def test_a_prefill_that_ends_just_after_its_turn_is_released(asked):
    call, decode, turn = asked
    turn.cancel()
    await is_cancelled(turn)
    assert not call.cancelled
    call.answer.set_result(result())

    async def told():
        return decode.released == [(7, "r")]

    await until(told)


async def test_a_prefill_that_ends_together_with_its_turn_is_released(asked):
    call, decode, turn = asked
    call.answer.set_result(result())
    turn.cancel()
    await is_cancelled(turn)

    async def told():
        return decode.released == [(7, "r")]

    await until(told)


async def test_a_prefill_that_goes_on_is_taken_back(asked, monkeypatch):
    monkeypatch.setattr(releases, "LAST_WORD_S", 0.01)
    call, decode, turn = asked
    turn.cancel()
    await is_cancelled(turn)

    async def taken_back():
        return call.cancelled

    await until(taken_back)
    assert decode.released == []


async def test_a_prefill_that_has_answered_when_it_is_taken_back_is_released(asked, monkeypatch):
    monkeypatch.setattr(releases, "LAST_WORD_S", 0.01)
    call, decode, turn = asked
    call.cancel = lambda: asyncio.get_running_loop().call_later(0.02, call.answer.set_result, result())
    turn.cancel()
    await is_cancelled(turn)

    async def told():
        return decode.released == [(7, "r")]

    await until(told)


async def test_a_prefill_that_fails_after_its_turn_is_nobodys(asked, caplog):
    call, decode, turn = asked
    turn.cancel()
    await is_cancelled(turn)
    call.answer.set_exception(Unavailable("gone"))
    await asyncio.sleep(0.01)
    assert (decode.released, caplog.records) == ([], [])


async def test_a_replica_that_drops_the_call_is_told_apart_from_a_turn_that_ends(asked):
    call, decode, turn = asked
    call.answer.cancel()
    await is_cancelled(turn)
    assert turn.cancelling() == 0
    assert decode.released == []


async def test_a_turn_that_ends_while_its_decode_call_is_under_way_gives_it_up_at_that_replica(asked):
    _, decode, turn = asked
    behind = Releases(Metrics(CollectorRegistry()))
    behind.give_up(decode, "one", result().handoff, "r-0")

    async def told():
        return decode.given_up == [(7, "r-0")]

    await until(told)
    assert decode.released == []
    turn.cancel()
    await is_cancelled(turn)
