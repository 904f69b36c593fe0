"""Ties chat-like HTTP calls to contexts (router/sessions/http_calls.py): a header names the session that a call goes on from.

The answer says in a header of its own how the call was served: the session is held from the prompt's layout until the last
byte of the answer has been sent.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface import http_turn
from prefillshare.router.sessions.http_calls import SessionCall

SESSION_HEADER = "x-prefillshare-session"
#: In the answer: "begun", "continued", or "as it is: " and the reason.
STATE_HEADER = "x-prefillshare-session-state"
#: Surfaces whose calls are conversations.
CHATS = frozenset({"/v1/chat/completions", "/v1/messages", "/v1/responses"})


class HttpSessions:
    """ASGI middleware, within the check of keys. `app.state.http_calls`: the router's HttpCalls."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        session_id = Headers(scope=scope).get(SESSION_HEADER, "")
        if scope["path"] not in CHATS:
            if session_id:
                return await _refuse(scope["path"], scope, receive, send)
            return await self._app(scope, receive, send)
        calls = scope["app"].state.http_calls
        async with AsyncExitStack() as stack:
            call = calls.on_session(session_id, stack) if session_id else calls.without_session()
            token = http_turn.bind(call)
            try:
                await self._app(scope, receive, _with_state(call, send) if session_id else send)
            finally:
                http_turn.unbind(token)


def _with_state(call: SessionCall, send):
    async def with_state(message):
        if message["type"] == "http.response.start" and call.state:
            header = (STATE_HEADER.encode(), call.state.encode("latin-1", "replace"))
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return with_state


async def _refuse(path: str, scope, receive, send) -> None:
    fix = f"leave it out, or use one of {', '.join(sorted(CHATS))}"
    error = InvalidInput(f"{path} does not go on from a session", field=SESSION_HEADER, fix=fix)
    body = {"error": {"message": str(error), "type": "Bad Request", "param": SESSION_HEADER, "code": error.http_status}}
    await JSONResponse(body, error.http_status)(scope, receive, send)
