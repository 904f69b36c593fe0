"""Size limits of HTTP requests, checked before all else: what is larger is refused before it is read or parsed.

A body is refused at once by its announced length, otherwise when more than the limit has come. It is not buffered here.
"""

from __future__ import annotations

from http import HTTPStatus

from prefillshare.kvshare_vllm.surface.http_errors import HttpError, refuse
from prefillshare.router.surfaces.request_limits import RequestLimits


class HttpLimits:
    """ASGI middleware."""

    def __init__(self, app, limits: RequestLimits):
        self._app, self._limits = app, limits

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if size > self._limits.header_bytes:
            text = f"the headers have {size} bytes; at most {self._limits.header_bytes} are taken (fix: send shorter ones)"
            return await _refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text, scope, receive, send)
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = next((value for name, value in headers if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self._limits.body_bytes:
            return await self._too_large(f"{int(announced)} bytes", scope, receive, send)
        received, answering = 0, False

        async def counted():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limits.body_bytes:
                raise _TooLarge
            return message

        async def watched(message):
            nonlocal answering
            answering = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _TooLarge:
            if not answering:
                await self._too_large("more than that", scope, receive, send)

    async def _too_large(self, size: str, scope, receive, send) -> None:
        most, fix = self._limits.body_bytes, "send less, or raise router.max_request_bytes"
        text = f"the body has {size}; at most {most} bytes are taken (fix: {fix})"
        await _refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, scope, receive, send)


class _TooLarge(Exception):
    """Raised through the wrapped app while it reads the body."""


async def _refuse(status: HTTPStatus, message: str, scope, receive, send) -> None:
    # The rest of the body is not read: the connection cannot be used again.
    how = {"headers": {"connection": "close"}, "close_code": 1009}
    await refuse(HttpError(status.value, message, status.phrase), scope, receive, send, **how)
