"""The route of Anthropic's Messages, which tells the turn that is bound to a request what of its prompt is to be kept.

Where a block ends in a prompt is found by laying out the request up to there: what that and the whole prompt have in common is
the beginning that is kept, whatever the template puts behind it.

Seam: vllm/entrypoints/anthropic/{api_router,serving}.py
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from fastapi import Depends, FastAPI, Request
from vllm.entrypoints.anthropic import api_router
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.cache_control import Breakpoint, breakpoints
from prefillshare.kvshare_vllm.surface.http_refusals import to_vllm, unnoted
from prefillshare.kvshare_vllm.surface.http_turn import HttpTurn, bound_turn, unbound
from prefillshare.kvshare_vllm.surface.request_checks import check_served

logger = logging.getLogger(__name__)

PATH = "/v1/messages"


class MessagesTurn(HttpTurn, Protocol):
    """What is bound to a request for a message."""

    def keep_up_to(self, beginnings: Sequence[tuple[list[int], float]]) -> None:
        """Called before `lay_out` if the request asks for it: whatever the prompt has in common with these token ids is to be
        kept, each for so many seconds."""


async def create_messages(request: AnthropicMessagesRequest, raw_request: Request):
    """Answer in a conversation with a decoder."""
    try:
        ends = breakpoints(await raw_request.json())
    except InvalidInput as error:
        raise to_vllm(error) from error
    turn, service = bound_turn(), api_router.messages(raw_request)
    if ends and turn and service:
        check_served(request.model, service.models)
        service.engine_client.check_admission()  # before anything is laid out
        with unbound(), unnoted():
            beginnings = [(await _laid_out(service, request, end), end.ttl_s) for end in ends]
        turn.keep_up_to([(token_ids, ttl_s) for token_ids, ttl_s in beginnings if token_ids])
    return await api_router.create_messages(request, raw_request)


async def _laid_out(service: AnthropicServingMessages, request: AnthropicMessagesRequest, end: Breakpoint) -> list[int]:
    """Token ids of the request up to there; empty if the template refuses such a beginning, of which then nothing is kept."""
    try:
        disabled = request.thinking is not None and request.thinking.type == "disabled"
        effort = await service._get_disabled_thinking_effort() if disabled else "none"
        chat = service.to_chat_completion_request(
            end.beginning(request), merge_inline_system=service._merge_inline_system, disabled_thinking_effort=effort
        )
        chat.add_generation_prompt, chat.stream, chat.stream_options = False, False, None
        rendered = await service.online_renderer.render_chat(chat)
    except Exception as error:  # the template's own, for example; the request itself is checked by vLLM
        logger.info("the prompt up to %s.%d is not kept: %s: %s", end.part, end.number, type(error).__name__, error)
        return []
    if isinstance(rendered, ErrorResponse):
        return []
    _, (prompt,) = rendered
    return list(prompt["prompt_token_ids"])


def serve_messages(app: FastAPI) -> None:
    """Put the route in the place of vLLM's."""
    routes = app.router.routes
    theirs = next(route for route in routes if getattr(route, "path", "") == PATH)
    routes.remove(theirs)
    app.post(PATH, dependencies=[Depends(validate_json_request)], responses=theirs.responses)(create_messages)
