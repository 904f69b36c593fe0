"""Refusals over HTTP, as clients expect them: a status of their own, also where a stream was asked for, and a hint.

vLLM starts a streamed response before the turn does, so that a refusal would come as an event after a 200. This ASGI
middleware holds the start of a stream until its first event: if that is an error, the response becomes that error.

Seam: vllm/entrypoints/openai: errors in a stream are `data: {"error": {..., "code": STATUS}}`
"""

from __future__ import annotations

import json
import math
from contextvars import ContextVar
from http import HTTPStatus

#: Where a refusal during this request leaves its hint, seconds; None outside a request.
_hint: ContextVar[list[float] | None] = ContextVar("prefillshare_retry_hint", default=None)


def note_retry_after(seconds: float) -> None:
    """The request being served is refused; trying again may help after so long."""
    if (hints := _hint.get()) is not None:
        hints.append(seconds)


class HttpRefusals:
    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        hints: list[float] = []
        token = _hint.set(hints)
        held, ended = None, False

        async def start(message):
            if message["status"] == HTTPStatus.TOO_MANY_REQUESTS:
                hint = str(math.ceil(hints[-1] if hints else 1)).encode()
                message = {**message, "headers": [*message["headers"], (b"retry-after", hint)]}
            await send(message)

        async def watched(message):
            nonlocal held, ended
            if ended:  # what vLLM still says after the error, as "data: [DONE]"
                return
            if message["type"] == "http.response.start":
                if _is_stream(message):
                    held = message
                    return
                return await start(message)
            if held is not None:
                first, held = held, None
                if error := _error(message.get("body", b"")):
                    body = json.dumps({"error": error}).encode()
                    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
                    await start({**first, "status": error["code"], "headers": headers})
                    ended = True
                    return await send({"type": "http.response.body", "body": body})
                await start(first)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            _hint.reset(token)


def _is_stream(message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"])


def _error(body: bytes) -> dict | None:
    """The error an event tells, if it does."""
    if not body.startswith(b"data: {"):
        return None
    try:
        event = json.loads(body[len(b"data: ") :].split(b"\n", 1)[0])
    except ValueError:
        return None
    error = event.get("error")
    return error if isinstance(error, dict) and isinstance(error.get("code"), int) and error["code"] >= 400 else None
