"""Log-probabilities are the sampler's arrays from the engine's outputs on."""

import numpy as np
import pytest
from told_logprobs import logprobs
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.outputs import LogprobsLists

from prefillshare.kvshare.logprobs import Logprobs
from prefillshare.kvshare_vllm.engine import array_logprobs


def test_parts_join_in_order_and_are_cut_to_what_is_wanted():
    told = Logprobs.joined([logprobs((9, -2.0), (1, -0.5), (9, -2.0), rank=2), logprobs((4, -1.0), (4, -1.0), (7, -3.0))])
    assert len(told) == 2
    assert told.ranks.tolist() == [2, 1]
    assert told.row(0) == {9: -2.0, 1: -0.5}
    assert told.likeliest(0).row(1) == {4: -1.0}
    assert told.likeliest(5).token_ids.tolist() == [[9, 1, 9], [4, 4, 7]]


def processed(asked: int | None, *steps: LogprobsLists | None):
    """What the front end of an engine puts out for a request that asks for so many."""
    processor = OutputProcessor(None, log_stats=False)
    array_logprobs.keep(processor)
    sampling = SamplingParams(logprobs=asked, detokenize=False, output_kind=RequestOutputKind.DELTA)
    request = EngineCoreRequest(
        request_id="r", external_req_id="r", prompt_token_ids=[1, 2], mm_features=None, sampling_params=sampling,
        pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    queue = RequestOutputCollector(sampling.output_kind, "r")
    processor.add_request(request, None, None, 0, queue)
    for number, step in enumerate(steps):
        tokens = [9] if step is None else step.logprob_token_ids[:, 0].tolist()
        is_last = number == len(steps) - 1
        end = FinishReason.LENGTH if is_last else None
        processor.process_outputs([EngineCoreOutput("r", tokens, new_logprobs=step, finish_reason=end)])
        yield queue.get_nowait().outputs[0]


def step(*rows: list[int]) -> LogprobsLists:
    ids = np.array(rows, np.int32)
    return LogprobsLists(ids, -ids.astype(np.float32), ids[:, 0] + 1)


def test_each_output_has_the_rows_of_its_own_tokens_as_wide_as_was_asked():
    """A batch's arrays are as wide as somebody else in it wants."""
    first, second = processed(1, step([5, 5, 6, 7]), step([8, 9, 8, 1], [3, 3, 4, 1]))
    told = [Logprobs.of_rows(output.logprobs) for output in (first, second)]
    assert [one.token_ids.tolist() for one in told] == [[[5, 5]], [[8, 9], [3, 3]]]
    assert told[1].values.tolist() == [[-8.0, -9.0], [-3.0, -3.0]]
    assert told[1].ranks.tolist() == [9, 4]
    assert told[1].values.dtype == np.float32


@pytest.mark.parametrize(("asked", "width"), [(0, 1), (3, 4), (-1, 4)])
def test_none_some_or_all_of_the_vocabulary(asked, width):
    (only,) = processed(asked, step([5, 5, 6, 7]))
    assert Logprobs.of_rows(only.logprobs).token_ids.shape == (1, width)


def test_who_asks_for_none_gets_none():
    (only,) = processed(None, None)
    assert only.logprobs is None
