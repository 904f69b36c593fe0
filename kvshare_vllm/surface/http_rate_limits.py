"""Tells HTTP clients how their tenant stands against its limits, in the headers that they read (kvshare/rate_limits.py).

This ASGI middleware is around HttpRefusals, which holds the start of a response until its turns have been admitted or refused.
"""

from __future__ import annotations

from prefillshare.kvshare import rate_limits

#: Where Anthropic's clients ask.
_ANTHROPIC = "/v1/messages"


class RateLimitHeaders:
    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        told, is_anthropic = rate_limits.listen(), scope["path"].startswith(_ANTHROPIC)

        async def with_headers(message):
            if message["type"] == "http.response.start" and told.standing:
                headers = rate_limits.headers(told.standing)
                if is_anthropic:
                    headers += rate_limits.anthropic_headers(told.standing)
                encoded = ((name.encode(), value.encode()) for name, value in headers)
                message = {**message, "headers": [*message.get("headers", ()), *encoded]}
            await send(message)

        await self._app(scope, receive, with_headers)
