"""API keys on the HTTP surface: every request but those to OPEN carries one, and runs as its tenant.

The check is around vLLM's whole app, so that nothing it serves can be reached without a key by oversight.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.errors import PermissionDenied, Unauthenticated
from prefillshare.router.tenants import Tenants, bearer

#: Paths that take no key: health, metrics and the description of the API. They show nothing of any tenant.
OPEN = frozenset({
    "/ready", "/health", "/ping", "/version", "/metrics", "/docs", "/docs/oauth2-redirect", "/openapi.json",
    "/static/swagger-ui-bundle.js", "/static/swagger-ui.css",
})
DOMAIN_HEADER = "x-prefillshare-cache-domain"


class ApiKeys:
    """ASGI middleware. The caller is set for the request's own context, which the tasks that serve it inherit."""

    def __init__(self, app, tenants: Tenants):
        self._app, self._tenants = app, tenants

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or _is_open(scope):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            key = bearer(headers.get("authorization")) or headers.get("x-api-key")
            caller = self._tenants.identify(key).in_domain(headers.get(DOMAIN_HEADER, ""))
        except (Unauthenticated, PermissionDenied) as error:
            return await _refuse(error, scope, receive, send)
        token = current_caller.set(caller)
        try:
            await self._app(scope, receive, send)
        finally:
            current_caller.reset(token)


def _is_open(scope) -> bool:
    # OPTIONS: browsers ask what they may send before they send a key.
    return scope["type"] == "http" and (scope["method"] == "OPTIONS" or scope["path"] in OPEN)


async def _refuse(error: Unauthenticated | PermissionDenied, scope, receive, send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": error.message})
    status = HTTPStatus(error.http_status)
    # The format of vLLM's own errors (vllm/entrypoints/serve/engine/protocol.py: ErrorResponse), and of OpenAI's.
    body = {"error": {"message": str(error), "type": status.phrase, "param": error.field, "code": status.value}}
    headers = {"www-authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
    await JSONResponse(body, status, headers)(scope, receive, send)
