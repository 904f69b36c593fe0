"""Rows of a shared prefix have no adapter, whatever part of it a step computes; all others keep theirs."""

import numpy as np
import pytest

from prefillshare.kvshare.modes import modes
from prefillshare.kvshare_vllm.models.base_rows import without_adapter

IN_PLACE = [mode for mode in modes() if mode.base_in_place and not mode.lends_responses]


@pytest.mark.parametrize("mode", IN_PLACE, ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("scheduled", "prompts", "computed", "expected"),
    [
        ([5], [5], [0], [0, 0, 0, 0, 7]),  # a whole prompt: its last token is the decoder's
        ([3], [9], [0], [0, 0, 0]),  # its first chunk
        ([3], [9], [6], [0, 0, 7]),  # its last one
        ([1], [9], [8], [7]),  # the last token alone
        ([1], [9], [9], [7]),  # a generated token
        ([4], [3], [0], [0, 0, 7, 7]),  # after a preemption: prompt and what was generated
        ([2], [3], [3], [7, 7]),  # ... the rest of it
        ([1], [1], [0], [7]),  # nothing is shared
    ],
)
def test_of_one_request(mode, scheduled, prompts, computed, expected):
    of_tokens = [7] * sum(scheduled)
    assert without_adapter(mode, of_tokens, *map(np.array, (scheduled, prompts, computed))) == tuple(expected)


@pytest.mark.parametrize("mode", IN_PLACE, ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("scheduled", "prompts", "computed", "expected"),
    [
        ([5], [5], [0], [0, 0, 7, 7, 7]),
        ([3], [9], [4], [0, 0, 7]),
        ([2], [9], [7], [7, 7]),  # a part of its own end
        ([2], [2], [0], [7, 7]),  # a prompt shorter than it
        ([6], [5], [0], [0, 0, 7, 7, 7, 7]),  # after a preemption
    ],
)
def test_a_decoder_with_an_own_end(mode, scheduled, prompts, computed, expected):
    given = map(np.array, (scheduled, prompts, computed))
    assert without_adapter(mode, [7] * sum(scheduled), *given, own_tokens=lambda place: 3) == tuple(expected)


@pytest.mark.parametrize("mode", IN_PLACE, ids=lambda mode: mode.name)
def test_requests_of_a_batch_are_told_apart(mode):
    scheduled, prompts, computed = [1, 3, 2, 1], [4, 3, 8, 1], [6, 0, 2, 0]
    of_tokens = [1, 2, 2, 2, 3, 3, 0]
    told = without_adapter(mode, of_tokens, *map(np.array, (scheduled, prompts, computed)))
    assert told == (1, 0, 0, 2, 0, 0, 0)
    own_tokens = {0: 1, 1: 2, 2: 5, 3: 1}.__getitem__
    told = without_adapter(mode, of_tokens, *map(np.array, (scheduled, prompts, computed)), own_tokens)
    assert told == (1, 0, 2, 2, 0, 3, 0)
