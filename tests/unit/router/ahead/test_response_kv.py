"""Which of eager prefill and pull-back a turn's response gets."""

from types import SimpleNamespace

import pytest

from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.handoff import Handoff
from prefillshare.kvshare.modes import modes
from prefillshare.router.ahead.response_kv import ResponseKV

SESSION = ("tenant", "session")
LENT = Handoff(4, "contract", 60.0, {})
LENDING = next(mode for mode in modes() if mode.lends_responses)
SHARING = next(mode for mode in modes() if mode.shares_prefill and not mode.lends_responses)
PER_MODEL = next(mode for mode in modes() if not mode.shares_prefill)


def decoder_of(mode):
    return Decoder("planner", "agents", mode.name, "planner", "lora")


class Recorder:
    """Eager prefill and pull-back, which do nothing but say what was asked of them."""

    def __init__(self):
        self.calls = []

    def grew(self, session, tokens, context, salt, pool, *, ended):
        assert (session, pool) == (SESSION, "agents")
        assert len(context()) == tokens
        self.calls.append(("ahead", tokens, salt, ended))

    def cancel(self, session):
        self.calls.append("cancel")

    def lent(self, session, token_ids, lent, salt, otherwise):
        self.calls.append(("pull", token_ids, lent, salt))
        otherwise()

    def give_back(self, lent):
        self.calls.append(("give back", lent))

    async def settled(self, session):
        self.calls.append("settled")


@pytest.fixture
def asked():
    return Recorder()


def take(response_kv, mode, *, salt=None, lent=None, ends=True):
    with response_kv.of_turn(SESSION, decoder_of(mode), [1, 2], lendable=True) as response:
        turn = SimpleNamespace(salt=salt, lent=None)
        response.turns = [turn]
        response.token_ids += [3, 4]
        response.grew()
        turn.lent = lent
        if not ends:
            raise ConnectionError
        response.token_ids += [5]
        response.ended()
    return response


def test_what_the_shared_pool_will_be_asked_for_is_prefilled_ahead_while_it_streams(asked):
    response = take(ResponseKV(asked), SHARING, salt="salt")
    assert asked.calls == ["cancel", ("ahead", 4, "salt", False), ("ahead", 5, "salt", True)]
    assert not response.lend
    assert response.ready is None


def test_a_pool_with_a_prefill_engine_of_its_own_gets_neither(asked):
    take(ResponseKV(asked, asked), PER_MODEL)
    assert asked.calls == ["cancel"]


async def test_what_a_decode_engine_lends_is_pulled_and_prefilled_ahead_only_where_it_is_not(asked):
    response = take(ResponseKV(asked, asked), LENDING, salt="salt", lent=LENT)
    assert asked.calls == ["cancel", ("pull", [1, 2, 3, 4, 5], LENT, "salt"), ("ahead", 5, "salt", True)]
    assert response.lend
    await response.ready()
    assert asked.calls[-1] == "settled"


@pytest.mark.parametrize(
    ("generated", "kept", "lent"),
    [([3, 4, 5], [3], 3), ([3, 4, 5], [3, 9, 9, 9], 3), ([3, 4, 5], [], 2), ([3, 4, 5], [7], 2), ([3, 4, 5], [3, 4, 5], 4)],
)
def test_kv_is_made_and_pulled_for_what_the_session_keeps_and_not_for_what_was_generated(asked, generated, kept, lent):
    with ResponseKV(asked, asked).of_turn(SESSION, decoder_of(LENDING), [1, 2], lendable=True) as response:
        response.token_ids += generated
        response.turns = [SimpleNamespace(salt=None, lent=LENT)]
        response.is_in_context_as(kept)
        assert response.context == [1, 2, *kept]
        response.ended()
    assert asked.calls == [
        "cancel",
        ("pull", [1, 2, *kept], Handoff(lent, "contract", 60.0, {}), None),
        ("ahead", 2 + len(kept), None, True),
    ]


def test_a_lending_engine_that_lends_nothing_is_prefilled_for(asked):
    take(ResponseKV(asked, asked), LENDING)
    assert asked.calls == ["cancel", ("ahead", 5, None, True)]


def test_without_pull_back_a_lending_mode_is_prefilled_for_while_it_streams(asked):
    take(ResponseKV(asked), LENDING)
    assert asked.calls == ["cancel", ("ahead", 4, None, False), ("ahead", 5, None, True)]


def test_a_turn_that_fails_leaves_nothing_behind(asked):
    with pytest.raises(ConnectionError):
        take(ResponseKV(asked, asked), LENDING, lent=LENT, ends=False)
    assert asked.calls == ["cancel", "cancel", ("give back", LENT)]


def test_a_suffix_is_not_lent(asked):
    with ResponseKV(pull_back=asked).of_turn(SESSION, decoder_of(LENDING), [1], lendable=False) as response:
        assert not response.lend


@pytest.mark.parametrize(
    ("mode", "lendable", "context"),
    [(SHARING, True, [8, 9, 5]), (LENDING, False, [8, 9, 5]), (LENDING, True, [1, 2, 5])],
)
def test_kv_is_made_behind_what_the_next_turn_will_have_unless_the_engine_lends_what_it_has(asked, mode, lendable, context):
    with ResponseKV(asked, asked).of_turn(SESSION, decoder_of(mode), [1, 2], lendable=lendable) as response:
        response.turns = [SimpleNamespace(salt=None, lent=LENT if response.lend else None)]
        response.token_ids += [5]
        response.go_on_from([8, 9])
        response.ended()
        assert response.context == context
    assert asked.calls[-1] == ("ahead", 3, None, True)
