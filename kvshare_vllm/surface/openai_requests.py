"""Reads requests as OpenAI's API means them where vLLM's request classes read them differently.

- A limit that does not fit beside the prompt is refused under the name the client used; vLLM shortens it silently.
- Without a limit, as many tokens as fit are allowed; for completions at most OpenAI's 16.
- A prompt that leaves no room for an answer is refused as too long; vLLM refuses a limit of 0 that nobody asked for.
- `echo` repeats text. In a chat it asks for no log-probabilities. In a completion it does if `logprobs` is given, 0 included,
  and is then refused: the prompt is prefilled elsewhere.
- A format keeps the name of the field that asked for it.

Seam: vllm/entrypoints/openai/{chat_completion,completion,responses}/protocol.py: to_sampling_params, to_beam_search_params
"""

from __future__ import annotations

from functools import wraps

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from prefillshare.kvshare_vllm.asked_formats import ResponseFormat, TextFormat

DEFAULT_COMPLETION_TOKENS = 16


def install() -> None:
    """Called once per process, before vLLM's app is built."""
    CompletionRequest.model_fields["max_tokens"].default = None  # vLLM puts it in where the client gave none
    for request, ways in (
        (ChatCompletionRequest, ("to_sampling_params", "to_beam_search_params")),
        (CompletionRequest, ("to_sampling_params", "to_beam_search_params")),
        (ResponsesRequest, ("to_sampling_params",)),
    ):
        for way in ways:
            setattr(request, way, _as_asked(getattr(request, way)))


def _as_asked(make_params):
    @wraps(make_params)
    def checked(request, room: int, *rest):
        """`room`: tokens that may be generated, which vLLM has limited to what fits."""
        field, asked = _limit(request)
        if room < 1 and asked != 0:
            raise VLLMValidationError(
                "the prompt is too long: it fills the model's whole length and leaves no room for an answer "
                "(fix: shorten it, or raise base.max_model_len)",
                parameter=_PROMPT_FIELDS[type(request)],
            )
        if asked is not None and asked > room:
            raise VLLMValidationError(
                f"{asked} tokens do not fit beside the prompt, {room} do "
                "(fix: ask for no more, shorten the prompt, or raise base.max_model_len)",
                parameter=field,
            )
        if isinstance(request, CompletionRequest):
            _check_echo(request)
            room = min(room, request.max_tokens)
        elif isinstance(request, ChatCompletionRequest) and request.echo:
            request = request.model_copy(update={"echo": False})
        params = make_params(request, room, *rest)
        if form := getattr(params, "structured_outputs", None):
            params.structured_outputs = _named(form, request)
        return params

    return checked


def _named(form: StructuredOutputsParams, request) -> StructuredOutputsParams:
    """The format under the name of the field that asked for it."""
    if request.structured_outputs is not None:
        return form
    return (TextFormat if isinstance(request, ResponsesRequest) else ResponseFormat).of(form)


_PROMPT_FIELDS = {ChatCompletionRequest: "messages", CompletionRequest: "prompt", ResponsesRequest: "input"}


def _limit(request) -> tuple[str, int | None]:
    """(the field of its limit, what the client gave there). A completion without a limit is given OpenAI's."""
    if isinstance(request, ResponsesRequest):
        return "max_output_tokens", request.max_output_tokens
    if isinstance(request, ChatCompletionRequest):
        newer = request.max_completion_tokens is not None
        field = "max_completion_tokens" if newer else "max_tokens"
        return field, vars(request)[field]  # as an attribute, a deprecated field warns
    if request.max_tokens is None:  # asked once per prompt
        request.max_tokens, request.has_default_limit = DEFAULT_COMPLETION_TOKENS, True
    return "max_tokens", None if getattr(request, "has_default_limit", False) else request.max_tokens


def _check_echo(request: CompletionRequest) -> None:
    if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
        raise VLLMValidationError(
            "with `logprobs` it asks for log-probabilities of the prompt's tokens, which are not computed here "
            "(fix: leave out `echo` or `logprobs`)",
            parameter="echo",
        )
