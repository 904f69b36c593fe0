"""What vLLM takes and cannot keep, or what would cost everybody, is refused with its field."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.request_checks import (
    _checked,
    check_asked,
    check_request,
    check_something_is_left,
    turns_of,
)

VOCAB, EOS = 10, 9
ASKED = [{"role": "user", "content": "a"}]


def sampling(bad_words=(), stops=(EOS,), **given) -> SamplingParams:
    """As vLLM's input processor leaves them: bad words as token ids, stop tokens with the model's own."""
    params = SamplingParams(**{"max_tokens": 8, **given})
    params._bad_words_token_ids = [list(ids) for ids in bad_words] or None
    params._all_stop_token_ids.update(stops)
    return params


def field(check, *given) -> str | None:
    try:
        check(*given)
    except InvalidInput as error:
        return error.field if error.fix else "without a fix"
    return None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"allowed_token_ids": [1, 2], "bad_words": [[1], [2]]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1, 2], "bad_words": [[1]]}, None),
        # After token 1, which is all that is allowed, its bad word forbids it.
        ({"allowed_token_ids": [1], "bad_words": [[1, 1]]}, "allowed_token_ids"),
        ({"bad_words": [[n] for n in range(VOCAB)]}, "bad_words"),
        ({"bad_words": [[n] for n in range(VOCAB - 1)]}, None),
        ({"allowed_token_ids": [EOS], "min_tokens": 3}, "allowed_token_ids"),
        ({"allowed_token_ids": [EOS]}, None),
        ({"allowed_token_ids": [EOS, 1], "min_tokens": 3}, None),
        ({"allowed_token_ids": [EOS, 1], "min_tokens": 3, "stop_token_ids": [1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [EOS, 1], "min_tokens": 3, "bad_words": [[1]]}, "allowed_token_ids"),
        ({"min_tokens": 3, "stops": range(VOCAB)}, "min_tokens"),
        ({"bad_words": [[n] for n in range(EOS)], "min_tokens": 1}, "bad_words"),
    ],
)
def test_a_request_that_can_leave_no_token_is_refused(given, expected):
    assert field(check_something_is_left, sampling(**given), VOCAB) == expected


FORMAT = StructuredOutputsParams(regex="a+")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a"] * 16}, None),
        ({"stop": ["a" * 20_000]}, "stop"),
        ({"bad_words": ["a" * 20_000]}, "bad_words"),
        ({"logit_bias": {1: float("-inf")}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"logit_bias": {1: -100.0}}, None),
        ({"repetition_detection": RepetitionDetectionParams(max_pattern_size=1000, min_count=4)}, "repetition_detection"),
        ({"repetition_detection": RepetitionDetectionParams(max_pattern_size=20, min_count=4)}, None),
        ({"structured_outputs": FORMAT, "allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"structured_outputs": FORMAT, "min_tokens": 2}, "min_tokens"),
        ({"structured_outputs": FORMAT}, None),
    ],
)
def test_sampling_that_costs_everybody_or_cannot_be_kept_is_refused(given, expected):
    assert field(check_asked, SamplingParams(**{"max_tokens": 8, **given})) == expected


@pytest.mark.parametrize(
    ("request_", "turns"),
    [
        (CompletionRequest(prompt="a"), 1),
        (CompletionRequest(prompt="a", n=5), 5),
        (CompletionRequest(prompt=[1, 2, 3], n=2), 2),
        (CompletionRequest(prompt=["a", "b", "c"], n=2), 6),
        (CompletionRequest(prompt=[[1], [2]], n=3), 6),
        (ChatCompletionRequest(messages=ASKED * 7, n=2), 2),
        (SimpleNamespace(messages=[ASKED, ASKED], n=None), 2),
        (SimpleNamespace(), 1),
    ],
)
def test_every_prompt_counts_n_times(request_, turns):
    assert turns_of(request_) == turns


BEAMS = {"messages": ASKED, "use_beam_search": True, "n": 2}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs"),
        ({"stop": ["a"]}, "stop"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"response_format": {"type": "text"}}, None),
        ({}, None),
    ],
)
def test_beam_search_is_refused_what_it_does_not_look_at(given, expected):
    assert field(check_request, ChatCompletionRequest(**BEAMS, **given), None, 100) == expected
    assert field(check_request, ChatCompletionRequest(**BEAMS | {"use_beam_search": False}, **given), None, 100) is None


def test_more_tokens_than_the_model_holds_are_not_turned_into_text():
    assert field(check_request, SimpleNamespace(tokens=[1] * 101), None, 100) == "tokens"
    assert field(check_request, SimpleNamespace(tokens=[1] * 100), None, 100) is None


def test_a_request_of_too_many_turns_goes_no_further_than_vllms_first_look():
    reached = []

    async def check_model(self, request):
        reached.append(request)

    class Client:
        def check_admission(self, turns):
            if turns > 3:
                raise InvalidInput(f"{turns} turns", field="n", fix="ask for fewer")

    models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="base")], lora_requests={})
    service = SimpleNamespace(engine_client=Client(), model_config=SimpleNamespace(max_model_len=100), models=models)
    checked = _checked(check_model)
    with pytest.raises(VLLMValidationError, match="4 turns") as caught:
        asyncio.run(checked(service, CompletionRequest(prompt=["a", "b"], n=2)))
    assert (caught.value.parameter, reached) == ("n", [])
    asyncio.run(checked(service, CompletionRequest(prompt=["a"], n=2)))
    assert len(reached) == 1
