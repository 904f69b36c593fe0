"""What a request asks of an engine is what its scheduler and connector read, and what they tell is what the front end reads."""

from __future__ import annotations

import pytest

from prefillshare.kvshare.errors import ResumeReason
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare_vllm.transfer import params
from prefillshare.kvshare_vllm.transfer.params import Asked, LoadCost, Told

#: As a transport gives it with a handoff.
TRANSFER = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[1, 2, 3]], "remote_host": "h"}


def test_a_decode_request_reads_and_says_what_it_replays():
    asked = Asked(params.to_read(TRANSFER, replay=3, own_layers=LayerGroup(1, 2)))
    assert asked.load_is_due
    assert (asked.replay_tokens, asked.own_layers, asked.lends, asked.prefills_alone) == (3, LayerGroup(1, 2), False, False)
    assert not asked.holds_nothing  # not before its load has begun: the prefill engine must hear of it


def test_once_its_load_has_begun_a_decode_request_holds_nothing_unless_it_lends():
    for lend in (True, False):
        given = params.to_read(TRANSFER, lend=lend)
        given["do_remote_prefill"] = False  # as vLLM does
        assert Asked(given).lends is lend
        assert Asked(given).holds_nothing is not lend


def test_one_with_nothing_to_share_reads_nothing():
    asked = Asked(params.to_read(None))
    assert not asked.load_is_due
    assert asked.holds_nothing


def test_a_prefill_holds_and_is_not_a_decode_engines():
    asked = Asked(params.to_hold())
    assert not asked.load_is_due
    assert not asked.holds_nothing


def test_a_pull_reads_so_many_blocks_and_holds_nothing():
    given = params.to_pull(TRANSFER, 2)
    assert given["remote_block_ids"] == [[1, 2]]
    assert Asked(given).load_is_due
    assert not Asked(given | {"do_remote_prefill": False}).lends
    assert TRANSFER["remote_block_ids"] == [[1, 2, 3]]


def test_what_is_released_is_due_and_never_read():
    assert Asked(params.to_be_released({**TRANSFER, "do_remote_prefill": False})).load_is_due


@pytest.mark.parametrize("given", [None, {}])
def test_who_asks_for_nothing_of_ours(given):
    asked = Asked(given)
    assert (asked.load_is_due, asked.replay_tokens, asked.own_layers, asked.prefills_alone) == (False, 0, None, False)
    assert not asked.holds_nothing


def test_what_a_load_cost_arrives_as_it_was_told():
    cost = LoadCost(300, 8, 0.1, 0.3)
    assert Told(cost.told()).cost == cost
    assert Told({**cost.told(), "remote_host": "h"}).cost == cost
    assert Told(None).cost == LoadCost()


def test_a_request_that_is_given_back_says_why():
    for reason in ResumeReason:
        assert Told(params.given_back(reason)).lost_by is reason
    told = Told(params.refused("no handoff"))
    assert (told.refused, told.lost_by, told.lent) == ("no handoff", None, None)


def test_what_is_lent_comes_with_its_length():
    lent, tokens = Told({"do_remote_decode": True, "remote_num_tokens": 40, "remote_host": "h"}).lent
    assert (tokens, lent["remote_host"]) == (40, "h")
    assert Told({"do_remote_decode": False}).lent is None
