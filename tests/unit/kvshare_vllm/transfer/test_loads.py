"""Shared prefixes on their way into an engine, without an engine: who waits for whom, what is offered, what it cost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.modes import modes
from prefillshare.kvshare_vllm.transfer.load_overlap import LoadOverlap
from prefillshare.kvshare_vllm.transfer.loads import Loads, rest_of
from prefillshare.kvshare_vllm.transfer.params import to_read

BLOCK = 4
GROUP = LayerGroup(2, 3)
RECOMPUTES = next(mode for mode in modes() if mode.recomputes)
TWO_STREAMS = next(mode for mode in modes() if mode.lends_responses)
#: Of a prompt of 20 tokens.
KEYS = tuple("abcde")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def made(clock, mode=RECOMPUTES, begin="pays") -> Loads:
    """A block has 10 bytes of hidden states before the group, and 80 of KV, of which the group's layers have 30."""
    return Loads(mode, BLOCK, lambda group: (10, 50) if group else (0, 80), LoadOverlap(begin), clock)


@pytest.fixture
def loads(clock):
    return made(clock)


def begin(loads, request="r", *, local=0, shared=19, group=None, keys=KEYS):
    loads.begins(request, shared_tokens=shared, local_tokens=local, keys=keys, group=group)


def waits(loads, request="other", missing=19, key="a") -> bool:
    return loads.must_wait(request, missing, lambda: key)


def test_how_much_is_shared_is_the_modes_to_say(clock):
    def request(**asked):
        return SimpleNamespace(num_prompt_tokens=20, num_tokens=25, kv_transfer_params=to_read(None, **asked))

    assert made(clock).shared_tokens_of(request()) == 19
    assert made(clock).shared_tokens_of(request(own_tokens=8)) == 12
    assert made(clock, TWO_STREAMS).shared_tokens_of(request()) == 24


def test_another_request_waits_for_the_first_block_that_it_lacks(loads):
    assert not waits(loads)
    begin(loads)
    assert [key for key in KEYS if waits(loads, key=key)] == ["a", "b", "c", "d"]  # the last block is not whole
    assert not waits(loads, "r")
    assert not waits(loads, missing=BLOCK - 1)
    assert loads.arrived("r").is_whole
    assert not any(waits(loads, key=key) for key in KEYS)


def test_what_is_there_already_is_waited_for_by_nobody(loads):
    begin(loads, local=8)
    assert [key for key in KEYS if waits(loads, key=key)] == ["c", "d"]
    begin(loads, "all there", local=19)
    assert loads.cost("all there").pulled_bytes == 0
    assert [key for key in KEYS if waits(loads, key=key)] == ["c", "d"]


def test_a_request_that_ends_before_its_load_keeps_nobody_waiting(loads):
    begin(loads)
    loads.forget("r")
    assert not any(waits(loads, key=key) for key in KEYS)
    assert loads.cost("r") is None


def test_of_two_that_load_the_same_block_the_later_one_is_waited_for(loads):
    """One that began before the other's blocks were known."""
    begin(loads, "first")
    begin(loads, "second")
    loads.arrived("first")
    assert waits(loads)
    loads.arrived("second")
    assert not waits(loads)


def test_what_a_load_cost_is_told_until_the_request_ends(loads, clock):
    begin(loads, local=8)
    clock.now += 0.25
    loads.arrived("r")
    cost = loads.cost("r")
    assert (cost.pulled_bytes, cost.local_tokens, cost.load_s, cost.rest_load_s) == (3 * 80, 8, 0.25, 0.0)
    assert loads.forget("r") is cost
    assert loads.cost("r") is None


class TestInTwoParts:
    """Of a request that computes layers itself."""

    def test_the_first_part_lets_it_begin_and_the_second_is_the_last(self, loads, clock):
        begin(loads, group=GROUP)
        assert loads.group_of("r") == GROUP
        clock.now += 0.1
        first = loads.arrived("r")
        assert (first.request_id, first.is_whole, first.is_first, first.is_last) == ("r", False, True, False)
        assert loads.rest_is_under_way("r")
        clock.now += 0.2
        last = loads.arrived(rest_of("r"))
        assert (last.request_id, last.is_whole, last.is_first, last.is_last) == ("r", False, False, True)
        assert not loads.is_under_way("r")
        cost = loads.cost("r")
        assert (cost.pulled_bytes, cost.load_s, cost.rest_load_s) == (5 * 60, pytest.approx(0.1), pytest.approx(0.3))

    def test_in_the_other_order_too(self, loads):
        begin(loads, group=GROUP)
        assert not loads.arrived(rest_of("r")).is_last
        assert not loads.rest_is_under_way("r")
        assert loads.is_under_way("r")
        assert loads.arrived("r").is_last

    def test_blocks_that_lack_the_other_layers_are_not_offered(self, loads):
        begin(loads, local=8, group=GROUP)
        loads.arrived("r")
        assert loads.offered("r", 19) == 8
        loads.arrived(rest_of("r"))
        assert loads.offered("r", 19) == 19
        assert loads.offered("somebody", 19) == 19

    def test_others_wait_until_its_own_layers_have_been_computed(self, loads):
        begin(loads, group=GROUP)
        loads.arrived("r")
        loads.arrived(rest_of("r"))
        assert waits(loads)
        loads.is_there("r")
        assert not waits(loads)

    @pytest.mark.parametrize("order", [("r", rest_of("r")), (rest_of("r"), "r")])
    def test_one_that_ends_meanwhile_keeps_its_blocks_until_both_have_arrived(self, loads, order):
        begin(loads, group=GROUP)
        loads.forget("r")
        assert not waits(loads)
        for name in order:
            assert loads.is_under_way("r")
            arrival = loads.arrived(name)
        assert arrival.is_last
        assert not loads.is_under_way("r")
        assert loads.cost("r") is None

    def test_it_begins_early_where_that_is_asked_for(self, clock):
        for how, early in (("always", True), ("never", False), ("pays", False)):
            loads = made(clock, begin=how)
            begin(loads, group=GROUP)
            loads.arrived("r")
            assert loads.begins_early("r") is early

    def test_one_that_lacks_nothing_is_in_no_parts(self, loads):
        begin(loads, local=19, group=GROUP)
        assert loads.group_of("r") is None
        assert loads.arrived("r").is_whole
        assert not loads.is_under_way("r")
