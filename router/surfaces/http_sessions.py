"""Ties chat-like HTTP calls to contexts (router/sessions/http_calls.py): a header names the session that a call goes on from.

An answer that is no error says in a header of its own how the call was served: the session is held from the prompt's layout
until the last byte of the answer has been sent.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

from fastapi import FastAPI

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface import http_turn
from prefillshare.kvshare_vllm.surface.http_errors import SESSION_HEADER, HttpError, refuse
from prefillshare.kvshare_vllm.surface.openai_app import items_reader
from prefillshare.router.responses.conversations import Conversations
from prefillshare.router.responses.response_call import ResponseCall
from prefillshare.router.responses.stored import StoredResponses
from prefillshare.router.responses.threads import Threads
from prefillshare.router.sessions.base import MAX_NAME_CHARS
from prefillshare.router.sessions.http_calls import HttpCalls, OpenCall, SessionCall
from prefillshare.router.surfaces.http_responses import add_routes

#: In the answer: "begun", "continued", or "as it is: " and the reason.
STATE_HEADER = "x-prefillshare-session-state"
#: Surfaces whose calls are conversations.
RESPONSES = "/v1/responses"
CHATS = frozenset({"/v1/chat/completions", "/v1/messages", RESPONSES})


def serve_chats(app: FastAPI, calls: HttpCalls, threads: Threads) -> None:
    """Have the app's HttpSessions tie calls to these contexts, and answer what is asked of stored ones."""
    app.state.http_calls, app.state.threads = calls, threads
    add_routes(app, StoredResponses(threads), Conversations(threads, calls, items_reader(app)))


class HttpSessions:
    """ASGI middleware, within the check of keys, of an app that `serve_chats` has been called for."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in CHATS:
            return await self._app(scope, receive, send)
        try:
            session_id = _session_named(scope)
        except InvalidInput as error:
            return await refuse(HttpError.of(error), scope, receive, send)
        calls, threads = scope["app"].state.http_calls, scope["app"].state.threads
        async with AsyncExitStack() as stack:
            if session_id:
                call = calls.on_session(session_id, stack)
            elif scope["path"] == RESPONSES:
                call = ResponseCall(calls, threads, stack)
            else:
                call = calls.without_session()
            token = http_turn.bind(call)
            try:
                await self._app(scope, receive, _with_state(call, send))
            finally:
                http_turn.unbind(token)


def _session_named(scope) -> str:
    """The session that a call's header names, in UTF-8; empty if there is none. Raises InvalidInput."""
    given = dict(scope["headers"]).get(SESSION_HEADER.encode(), b"")
    try:
        name = given.decode()
    except UnicodeDecodeError:
        raise InvalidInput("it is not in UTF-8", field=SESSION_HEADER, fix="send the session's name in UTF-8") from None
    if len(name) > MAX_NAME_CHARS:
        raise InvalidInput(f"{len(name)} characters", field=SESSION_HEADER, fix=f"use at most {MAX_NAME_CHARS}")
    return name


def _with_state(call: SessionCall | ResponseCall | OpenCall, send):
    async def with_state(message):
        if message["type"] == "http.response.start" and call.state and message["status"] < 400:
            header = (STATE_HEADER.encode(), call.state.encode("latin-1", "replace"))
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return with_state
