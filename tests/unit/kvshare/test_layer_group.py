"""Groups of layers: what a text means, whose blocks are whose, what hidden states take."""

import pytest

from prefillshare.kvshare.layer_group import LayerGroup, block_salt, ecache_parts, layer_group


def test_a_group_is_written_as_its_first_and_last_layer():
    group = layer_group("4-9")
    assert (group.first, group.last, len(group), str(group)) == (4, 9, 6, "4-9")
    assert [layer for layer in range(12) if layer in group] == [4, 5, 6, 7, 8, 9]
    assert layer_group("none") is None


@pytest.mark.parametrize("text", ["", "4", "9-4", "-1-3", "4-", "a-b", "4 - 9", "4-9,11-12"])
def test_what_is_no_group_is_refused(text):
    with pytest.raises(ValueError, match="group"):
        layer_group(text)


def test_only_a_group_that_begins_above_needs_hidden_states():
    assert LayerGroup(0, 3).transition is None
    assert LayerGroup(1, 3).transition == 1


def test_blocks_of_two_groups_have_different_salts():
    salts = [block_salt(salt, group) for salt in (None, "tenant") for group in (None, LayerGroup(1, 2), LayerGroup(1, 3))]
    assert salts[0] is None
    assert len(set(salts)) == 6


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((576, 3, 64), 2),  # SmolLM2-135M: 576 numbers, 384 to a layer
        ((4096, 8, 128), 2),  # Llama-3.1-8B
        ((4096, 8, 128, 8), 2),  # ... on eight ranks
        ((128, 2, 32), 1),
        ((8192, 8, 128, 16), 2),  # more ranks than KV heads: each has one
    ],
)
def test_hidden_states_take_as_many_cache_layers_as_they_need(shape, parts):
    assert ecache_parts(*shape) == parts
