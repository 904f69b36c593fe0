"""Refuses, with the field and the fix, what vLLM's server accepts but ignores, and what would hold up every other turn.

`check_request` sees a parsed HTTP request before its prompt is rendered; the other two see the sampling parameters of
either surface, before and after vLLM's own checks.

Seam: vllm/entrypoints/serve/engine/serving.py (BaseServing._check_model), vllm/entrypoints/generate/beam_search/online.py
"""

from __future__ import annotations

import math

from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMValidationError

from prefillshare.kvshare.errors import InvalidInput, NotFound
from prefillshare.kvshare_vllm.surface.http_refusals import to_vllm
from prefillshare.kvshare_vllm.surface.http_turn import note_asked

MOST_STOPS = 16
#: Characters of all stop texts together (every new piece of text is compared with them), and of all bad words together (they
#: are tokenised).
MOST_STOP_CHARS = 16 << 10
#: For max_pattern_size times min_count: that much of a response is searched again after each of its tokens.
MOST_REPETITION = 256

#: Fields that beam search ignores, and the values of them that ask for nothing.
_NOT_IN_BEAMS = {
    "response_format": (None,), "structured_outputs": (None,), "logit_bias": (None, {}), "allowed_token_ids": (None,),
    "bad_words": (None, []), "stop": (None, []), "stop_token_ids": (None, []), "min_tokens": (None, 0),
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "repetition_penalty": (None, 1),
    "tool_choice": (None, "none", "auto"), "repetition_detection": (None,),
}  # fmt: skip


def check_request(request, client: EngineClient | None, max_model_len: int) -> None:
    """`client` knows how many turns can be in progress. Raises InvalidInput, or what the client raises."""
    if client is not None:
        client.check_admission(turns_of(request))
    if len(getattr(request, "tokens", None) or ()) > max_model_len:
        text = f"{len(request.tokens)} tokens are more than the model's length of {max_model_len}"
        raise InvalidInput(text, field="tokens", fix="send fewer")
    if (most := getattr(request, "max_output_tokens", None)) is not None and most < 1:
        raise InvalidInput(f"{most} leaves no room for a response", field="max_output_tokens", fix="use 1 or more")
    if getattr(request, "use_beam_search", False):
        for field, nothing in _NOT_IN_BEAMS.items():
            value = getattr(request, field, None)
            if value not in nothing and getattr(value, "type", None) != "text":
                fix = "leave it out, or set use_beam_search to false"
                raise InvalidInput("beam search does not keep to it", field=field, fix=fix)


def check_served(model: str | None, models: OpenAIServingModels, *, is_needed: bool = False) -> None:
    """Raises what vLLM's server answers with as 404 for a model that is not served; the message lists those that are.
    `is_needed`: no model is not served either."""
    names = [*(path.name for path in models.base_model_paths), *models.lora_requests]
    if (model or is_needed) and model not in names:
        raise to_vllm(NotFound(f"no model {model[:128]!r} is served", field="model", fix=f"use one of {', '.join(names)}"))


def turns_of(request) -> int:
    """How many turns a request is: each of its prompts or conversations, n times."""
    several = 1
    for given, of_one in ((getattr(request, "prompt", None), int), (getattr(request, "messages", None), dict)):
        if isinstance(given, list) and given and isinstance(given[0], str | list) and not isinstance(given[0], of_one):
            several = len(given)
    return several * (getattr(request, "n", None) or 1)


def check_asked(params: SamplingParams) -> None:
    """Refuse what would be too expensive to process; called before vLLM processes it. Raises InvalidInput."""
    if len(params.stop) > MOST_STOPS:
        raise InvalidInput(f"{len(params.stop)} stop texts", field="stop", fix=f"give at most {MOST_STOPS}")
    for field in ("stop", "bad_words"):
        if (chars := sum(map(len, getattr(params, field)))) > MOST_STOP_CHARS:
            raise InvalidInput(f"{chars} characters", field=field, fix=f"give at most {MOST_STOP_CHARS} altogether")
    repetition = params.repetition_detection
    if repetition and repetition.max_pattern_size * repetition.min_count > MOST_REPETITION:
        raise InvalidInput(
            f"max_pattern_size {repetition.max_pattern_size} times min_count {repetition.min_count} is too much to look for",
            field="repetition_detection",
            fix=f"keep their product within {MOST_REPETITION}",
        )
    if not all(map(math.isfinite, (params.logit_bias or {}).values())):
        raise InvalidInput("a bias is not a finite number", field="logit_bias", fix="use values from -100 to 100")
    for field in ("allowed_token_ids", "min_tokens"):
        if params.structured_outputs and getattr(params, field):
            raise InvalidInput(
                "the format of the response says which tokens may come and where it may end; both together can leave none",
                field=field,
                fix="leave it out where a response has a format (response_format, structured_outputs, tools)",
            )


def check_something_is_left(params: SamplingParams, vocab_size: int) -> None:
    """Refuse parameters that forbid every token, with which an engine would give token 0 for ever. Called after vLLM has filled
    them in. Raises InvalidInput."""
    fields, forbidden = [], set()
    if params.bad_words_token_ids:
        fields.append("bad_words")
        forbidden |= {ids[-1] for ids in params.bad_words_token_ids}  # of a word of several tokens, the last is forbidden
    if params.min_tokens > 0 and params.all_stop_token_ids:
        fields.append("min_tokens")  # until then no stop token may be generated
        forbidden |= params.all_stop_token_ids
    if params.allowed_token_ids is not None:
        fields.insert(0, "allowed_token_ids")
        left = len(set(params.allowed_token_ids) - forbidden)
    else:
        left = vocab_size - sum(0 <= token < vocab_size for token in forbidden)
    if left <= 0:
        raise InvalidInput(
            f"{' and '.join(fields)} can leave no token to generate",
            field=fields[0],
            fix="allow a token with which no bad word and, until min_tokens, no response ends",
        )


def _checked(check_model):
    """Wraps BaseServing._check_model, the first thing that every service does with a request."""

    async def checked(self, request):
        note_asked(self, request)
        check_served(getattr(request, "model", None), self.models)
        try:
            check_request(request, getattr(self, "engine_client", None), self.model_config.max_model_len)
        except InvalidInput as error:
            raise VLLMValidationError(str(error), parameter=error.field) from error
        return await check_model(self, request)

    return checked


def check_http_requests() -> None:
    """From now on every service of vLLM's server has its requests checked first."""
    if BaseServing._check_model.__name__ != "checked":
        BaseServing._check_model = _checked(BaseServing._check_model)
