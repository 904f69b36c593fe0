"""Web pages of other origins may call the HTTP surface, as far as `router.cors_origins` says (CORS)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from starlette.middleware.cors import CORSMiddleware

from prefillshare.kvshare.rate_limits import REQUESTS, TOKENS
from prefillshare.kvshare_vllm.surface.asked_fields import IGNORED_HEADER

#: Response headers that scripts may read, besides those that browsers always show them.
_SHOWN = (
    "retry-after",
    "x-request-id",
    "x-prefillshare-session-state",
    IGNORED_HEADER,
    *(f"x-ratelimit-{which}-{what}" for what in (REQUESTS, TOKENS) for which in ("limit", "remaining", "reset")),
)


def cors(origins: Sequence[str]) -> list[Callable]:
    """Middleware to put around the check of keys, because a browser's preflight request has no key. Empty without origins.

    Pages send their keys in headers; cookies are not used, so no credentials are allowed.
    """
    if not origins:
        return []
    return [
        partial(CORSMiddleware, allow_origins=origins, allow_methods=("*",), allow_headers=("*",), expose_headers=_SHOWN)
    ]
