"""Which of its groups of layers a turn has the decoder compute."""

import pytest

from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.router.turn.layer_choice import LEAST_TOKENS, LayerChoice

MOST, SOME = LayerGroup(2, 9), LayerGroup(2, 3)


def decoder(objective=1.0, groups=(MOST, SOME, None)):
    return Decoder("d", "pool", "droidspeak", None, "full", groups, objective)


@pytest.fixture
def choice():
    """In its pool a token and layer has taken a millisecond."""
    choice = LayerChoice(lambda: 0.0)
    choice.took("pool", 100, MOST, 0.8)
    return choice


def chosen(choice, tokens, spent_s=0.0, cached=0, **kw):
    return choice.choose(decoder(**kw), tokens, spent_s, lambda group: cached if group == MOST else 0)


def test_most_layers_are_taken_that_leave_the_first_token_in_time(choice):
    assert [chosen(choice, tokens) for tokens in (125, 126, 500, 501)] == [MOST, SOME, SOME, None]


def test_what_the_turn_has_waited_counts(choice):
    assert [chosen(choice, 100, spent_s) for spent_s in (0.2, 0.21, 0.8, 0.81, 5.0)] == [MOST, SOME, SOME, None, None]


def test_what_is_cached_for_a_group_is_not_computed_again(choice):
    assert chosen(choice, 1000, cached=900) == MOST


def test_where_not_even_the_fewest_are_in_time_they_are_taken(choice):
    assert chosen(choice, 9000, groups=(MOST, SOME)) == SOME


def test_the_first_is_taken_where_nothing_is_wished_or_known(choice):
    assert chosen(choice, 9000, objective=None) == MOST
    assert chosen(LayerChoice(lambda: 0.0), 9000) == MOST


def test_a_call_of_few_tokens_says_nothing_of_layers(choice):
    choice.took("pool", LEAST_TOKENS - 1, MOST, 100.0)
    choice.took("pool", 100, None, 100.0)
    assert chosen(choice, 125) == MOST


def test_a_loaded_pool_computes_fewer(choice):
    choice.took("pool", 100, SOME, 20.0)
    assert chosen(choice, 100) is None
