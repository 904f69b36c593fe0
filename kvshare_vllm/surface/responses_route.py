"""The route that makes responses (OpenAI's Responses API), with what a response goes on from and where it is kept left to the
turn that is bound to the request. vLLM's own store knows no tenants and forgets nothing; it is not used.

Seam: vllm/entrypoints/openai/responses/{api_router,serving,utils}.py
"""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from vllm.entrypoints.openai.responses.api_router import _convert_stream_to_sse_events, responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.utils import construct_chat_messages_with_tool_call
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import safe_apply_chat_template

from prefillshare.kvshare.errors import InvalidInput, PrefillShareError
from prefillshare.kvshare_vllm.surface.asked_fields import check_items
from prefillshare.kvshare_vllm.surface.http_refusals import to_vllm
from prefillshare.kvshare_vllm.surface.http_turn import Conversation, HttpTurn, bound_turn
from prefillshare.kvshare_vllm.surface.response_events import as_documented, mark_cut_off
from prefillshare.kvshare_vllm.surface.text_work import chars_of
from prefillshare.kvshare_vllm.surface.tool_results import check_results, of_response
from prefillshare.kvshare_vllm.surface.validation_errors import told
from prefillshare.kvshare_vllm.vllm_refusals import for_clients

PATH = "/v1/responses"
#: Fields that requests may leave null, and of which vLLM shows null in a response that may not have it.
_MAY_BE_NULL = ("background", "truncation")


class ResponseTurn(HttpTurn, Protocol):
    """What is bound to a request for a response. Its methods raise PrefillShareError."""

    async def begin(self, request: ResponsesRequest) -> None:
        """Called first, with the request as parsed; takes from it what vLLM must not act upon."""

    def dress(self, response: ResponsesResponse) -> None:
        """Put in a response what vLLM does not know of it; called for each event that shows one."""

    async def finish(self, response: ResponsesResponse) -> None:
        """The response has ended, complete or cut off; called before its client is told."""


@with_cancellation
@load_aware_call
async def create_responses(request: ResponsesRequest, raw_request: Request):
    """Make a response with a decoder."""
    turn = bound_turn()
    if not hasattr(turn, "begin"):  # the call names a session, which is no place for responses
        turn = _Passing(turn)
    try:
        _check_served(request)
        for field in _MAY_BE_NULL:
            if getattr(request, field) is None:
                setattr(request, field, ResponsesRequest.model_fields[field].default)
        await turn.begin(request)
        made = await responses(raw_request).create_responses(request, raw_request)
        if isinstance(made, ErrorResponse):
            return JSONResponse(made.model_dump(mode="json", by_alias=True), made.error.code)
        if isinstance(made, ResponsesResponse):
            mark_cut_off(made)
            _dress(turn, made)
            await turn.finish(made)
            return JSONResponse(made.model_dump(mode="json", by_alias=True))
    except PrefillShareError as error:
        raise to_vllm(error) from error
    return StreamingResponse(_convert_stream_to_sse_events(_dressed(turn, made)), media_type="text/event-stream")


def _check_served(request: ResponsesRequest) -> None:
    """Raises InvalidInput for what vLLM would refuse in words about its own server, or leave unread."""
    if request.background:
        raise InvalidInput("responses are made while their clients wait", field="background", fix="leave it out, or stream")
    if request.previous_input_messages:
        raise InvalidInput("it is not read", field="previous_input_messages", fix="send the messages as input")


async def _dressed(turn: ResponseTurn, events):
    async for event in as_documented(events):
        if isinstance(response := getattr(event, "response", None), ResponsesResponse):
            _dress(turn, response)
            if event.type in ("response.completed", "response.incomplete"):
                try:
                    await turn.finish(response)
                except PrefillShareError as error:
                    raise to_vllm(error) from error
        yield event


def _dress(turn: ResponseTurn, response: ResponsesResponse) -> None:
    response.error = None  # OpenAI's responses have it always
    turn.dress(response)


class _Passing:
    """For a turn that keeps no responses."""

    def __init__(self, turn: HttpTurn | None):
        self._turn = turn

    async def begin(self, request: ResponsesRequest) -> None:
        for field in ("previous_response_id", "conversation"):
            if getattr(request, field, None):
                raise InvalidInput(
                    "a call that names a session goes on from that session",
                    field=field,
                    fix="leave it out, or leave the session's header out",
                )
        items = () if isinstance(request.input, str) else request.input
        check_results([item if isinstance(item, dict) else item.model_dump() for item in items], "input", of_response)

    def dress(self, response: ResponsesResponse) -> None:
        response.store = False

    async def finish(self, response: ResponsesResponse) -> None: ...


def serve_responses(app: FastAPI) -> None:
    """Put the route in the place of vLLM's."""
    routes = app.router.routes
    theirs = next(route for route in routes if getattr(route, "path", "") == PATH)
    routes.remove(theirs)
    needs = [Depends(validate_json_request)]
    app.post(PATH, dependencies=needs, responses=theirs.responses)(create_responses)


class Items:
    """Reads items of conversations: what the Responses API calls a message, a function call or the output of one.

    `service`: vLLM's, of an app that serves responses.
    """

    def __init__(self, service: Any):
        self._service = service

    def parsed(self, items: list[dict[str, Any]], field: str) -> list[Any]:
        """As vLLM's server understands them. Raises InvalidInput."""
        check_items(items, field)  # vLLM would fetch pictures
        try:
            return ResponsesRequest(input=items).input
        except ValidationError as error:
            place, what = told(error.errors())
            raise InvalidInput(what, field=f"{field}{(place or '').removeprefix('input')}") from error
        except VLLMValidationError as error:
            raise InvalidInput(_text_of(error), field=field) from error

    def conversation(self, items: list[dict[str, Any]], field: str) -> Conversation:
        """The items as chat messages, and how the base's template lays them out. Raises InvalidInput."""
        service, renderer = self._service, self._service.online_renderer
        config, tokenizer = service.model_config, service.renderer.tokenizer
        try:
            said = construct_chat_messages_with_tool_call(self.parsed(items, field))
            messages, _, _ = parse_chat_messages(said, config, content_format="string")
        except VLLMValidationError as error:
            raise InvalidInput(_text_of(error), field=field) from error

        def render(messages, answer, tools):
            template = {"chat_template": renderer.chat_template, **renderer.default_chat_template_kwargs}
            how = {"tools": tools, "tokenize": False, "add_generation_prompt": answer}
            return safe_apply_chat_template(config, tokenizer, list(messages), **template | how)

        return Conversation(messages, None, False, render, chars_of(messages))


def _text_of(error: VLLMValidationError) -> str:
    return for_clients(str(error.args[0] if error.args else error))  # str(error) repeats the parameter
