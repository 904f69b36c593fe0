"""The arithmetic of R1 and R2 in every sharing mode."""

import pytest

from prefillshare.kvshare.modes import SharingMode, get_mode, mode_names, modes


def test_modes_are_listed_in_the_order_help_shows_them():
    assert mode_names() == ("prefillshare", "icarus", "droidspeak", "none")


@pytest.mark.parametrize("name", mode_names())
def test_mode_declares_its_whole_policy(name):
    mode = get_mode(name)
    assert isinstance(mode, SharingMode)
    assert mode.name == name
    assert mode.summary
    assert "\n" not in mode.summary
    asked = ("shares_prefill", "adapters_share_blocks", "full_weights", "lends_responses", "recomputes")
    for question in asked:
        assert isinstance(getattr(mode, question), bool), question


def test_a_decoder_with_an_own_end_computes_that_many_tokens_and_no_other_decoder_finds_them():
    mode = get_mode("prefillshare")
    assert mode.own_end
    assert [mode.handoff_tokens(n, own_tokens=40) for n in (1, 40, 41, 100)] == [0, 0, 1, 60]
    assert mode.handoff_tokens(100, 25, 40) == 60  # what a resumed request has generated is its own, too
    assert [mode.cacheable_tokens(100, computed, 40) for computed in (0, 60, 61, 500)] == [0, 60, 60, 60]


def test_unknown_mode_lists_the_known_ones():
    with pytest.raises(KeyError, match="unknown sharing mode 'x'; known: prefillshare, icarus, droidspeak, none"):
        get_mode("x")


@pytest.mark.parametrize("mode", ["prefillshare", "droidspeak"])
@pytest.mark.parametrize(("prompt_tokens", "handed_over"), [(1, 0), (2, 1), (32, 31), (33, 32), (4096, 4095)])
def test_all_but_the_last_prompt_token_is_handed_over(mode, prompt_tokens, handed_over):
    assert get_mode(mode).handoff_tokens(prompt_tokens) == handed_over


@pytest.mark.parametrize("mode", ["prefillshare", "droidspeak"])
@pytest.mark.parametrize(
    ("prompt_tokens", "computed_tokens", "cacheable"),
    [
        (1, 1, 0),  # the only prompt token is the decoder's
        (33, 0, 0),
        (33, 31, 31),
        (33, 32, 32),  # a whole block of base KV
        (33, 33, 32),  # the last prompt token's KV is the decoder's
        (33, 500, 32),  # so is everything generated
        (32, 500, 31),  # the last block of a prompt of whole blocks is not offered
    ],
)
def test_only_the_shared_prefix_is_offered(mode, prompt_tokens, computed_tokens, cacheable):
    assert get_mode(mode).cacheable_tokens(prompt_tokens, computed_tokens) == cacheable


@pytest.mark.parametrize("prompt_tokens", [1, 32, 33])
def test_icarus_hands_over_all_but_the_last_token_and_offers_everything(prompt_tokens):
    mode = get_mode("icarus")
    assert mode.handoff_tokens(prompt_tokens) == prompt_tokens - 1
    assert mode.handoff_tokens(prompt_tokens, 40) == prompt_tokens + 39  # a resumed request's own tokens are base KV, too
    assert [mode.cacheable_tokens(prompt_tokens, computed) for computed in (0, 32, 500)] == [0, 32, 500]


def test_only_base_kv_can_be_handed_over_for_generated_tokens():
    for mode in modes():
        assert mode.lends_responses or mode.handoff_tokens(33, 40) == mode.handoff_tokens(33), mode.name


@pytest.mark.parametrize("prompt_tokens", [1, 32, 33])
def test_per_model_baseline_hands_over_all_but_the_last_token_and_offers_everything(prompt_tokens):
    mode = get_mode("none")
    assert mode.handoff_tokens(prompt_tokens) == prompt_tokens - 1
    assert [mode.cacheable_tokens(prompt_tokens, computed) for computed in (0, 32, 500)] == [0, 32, 500]


@pytest.mark.parametrize("mode", [get_mode(name) for name in mode_names()], ids=lambda mode: mode.name)
def test_no_mode_offers_or_hands_over_what_does_not_exist(mode):
    for prompt_tokens in range(1, 70):
        assert 0 <= mode.handoff_tokens(prompt_tokens) <= prompt_tokens
        for computed_tokens in range(140):
            assert 0 <= mode.cacheable_tokens(prompt_tokens, computed_tokens) <= computed_tokens


def test_block_shared_between_adapters_never_holds_decoder_kv():
    for mode in modes():
        if mode.adapters_share_blocks and not mode.lends_responses:
            assert all(mode.cacheable_tokens(n, 10 * n) <= mode.handoff_tokens(n) for n in range(1, 200)), mode.name
