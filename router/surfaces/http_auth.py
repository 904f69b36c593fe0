"""API keys on the HTTP surface: every request but those to OPEN carries one, and runs as its tenant.

The check is around vLLM's whole app, so that nothing it serves can be reached without a key by oversight.
"""

from __future__ import annotations

from starlette.datastructures import Headers

from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.errors import InvalidInput, PermissionDenied, Unauthenticated
from prefillshare.kvshare_vllm.surface.http_errors import HttpError, refuse
from prefillshare.kvshare_vllm.surface.self_description import SCRIPT, STYLE
from prefillshare.router.tenants import Tenants, bearer
from prefillshare.router.ui import page

#: Paths that take no key: health, the description of the API, the page at /ui but for its data. They show nothing of any
#: tenant. `/metrics` is answered before (NodeMetrics, with `shows_all`).
OPEN = frozenset({
    "/ready", "/health", "/ping", "/version", "/docs", SCRIPT, STYLE, "/openapi.json", *page.OPEN,
})
DOMAIN_HEADER = "x-prefillshare-cache-domain"
#: How far the request goes behind its tenant's others; for routes whose body has no `priority`, and added to that where it has.
PRIORITY_HEADER = "x-prefillshare-priority"


class ApiKeys:
    """ASGI middleware. The caller is set for the request's own context, which the tasks that serve it inherit."""

    def __init__(self, app, tenants: Tenants):
        self._app, self._tenants = app, tenants

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or _is_open(scope):
            return await self._app(scope, receive, send)
        sent = Headers(scope=scope)
        try:
            caller = self._tenants.identify(_key(sent)).in_domain(sent.get(DOMAIN_HEADER, ""))
            caller = caller.behind(_steps(sent.get(PRIORITY_HEADER, "0")), PRIORITY_HEADER)
        except (Unauthenticated, PermissionDenied, InvalidInput) as error:
            headers = {"www-authenticate": "Bearer"} if isinstance(error, Unauthenticated) else None
            return await refuse(HttpError.of(error), scope, receive, send, headers=headers)
        token = current_caller.set(caller)
        try:
            await self._app(scope, receive, send)
        finally:
            current_caller.reset(token)


def shows_all(tenants: Tenants, headers: Headers) -> bool:
    """Whether who sends these may see figures of all tenants. Raises Unauthenticated."""
    return tenants.shows_all(_key(headers))


def _key(headers: Headers) -> str | None:
    return bearer(headers.get("authorization")) or headers.get("x-api-key")


def _is_open(scope) -> bool:
    # OPTIONS: browsers ask what they may send before they send a key.
    return scope["type"] == "http" and (scope["method"] == "OPTIONS" or scope["path"] in OPEN)


def _steps(written: str) -> int:
    try:
        return int(written)
    except ValueError:
        raise InvalidInput(f"{written!r} is no whole number", field=PRIORITY_HEADER, fix="use a number from 0 to 100") from None
