"""The routes of the page at /ui.

The page itself shows nothing of anybody and takes no key (OPEN). Its data takes one, like everything else on the HTTP surface,
so that without a key there is only a form that asks for it. Both answer only under a host that the router is known by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from prefillshare.kvshare import host_names
from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.config import Router
from prefillshare.kvshare.errors import InvalidInput, PrefillShareError
from prefillshare.kvshare_vllm.surface.http_errors import HttpError, response_of
from prefillshare.router.ui.feed import Feed

PAGE, DATA = "/ui", "/ui/data"
_FOLDER = Path(__file__).parent / "static"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_INDEX = "index.html"
#: What is only there with `router.ui: full`.
_PLAYGROUND = frozenset({"playground.js"})
FILES = tuple(sorted(path.name for path in _FOLDER.iterdir() if path.suffix in _KINDS))
#: Paths that take no key.
OPEN = frozenset({PAGE, f"{PAGE}/", *(f"{PAGE}/{name}" for name in FILES if name != _INDEX)})

#: A browser loads nothing from elsewhere, runs no script but ours, makes no markup of text, and shows the page in no other.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

_Endpoint = Callable[[Request], Awaitable[Response]]


def page_routes(feed: Feed, config: Router) -> list[BaseRoute]:
    """Empty if `router.ui` is off. Links are relative, so that a proxy may put the router under a path of its own."""
    if config.ui == "off":
        return []
    hosts = Hosts(config)

    def route(path: str, endpoint: _Endpoint) -> BaseRoute:
        return Route(path, _guarded(hosts, endpoint), methods=["GET"], include_in_schema=False)

    async def data(request: Request) -> Response:
        told = feed.told(current_caller.get().tenant, request.query_params.get("known", ""))
        body = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
        return Response(body.encode("utf-8", "replace"), media_type="application/json", headers={"cache-control": "no-store"})

    async def to_the_page(request: Request) -> Response:
        return RedirectResponse("../ui")

    left_out = frozenset() if config.ui == "full" else _PLAYGROUND
    files = [
        route(PAGE if name == _INDEX else f"{PAGE}/{name}", _file(_FOLDER / name)) for name in FILES if name not in left_out
    ]
    return [*files, route(f"{PAGE}/", to_the_page), route(DATA, data)]


class Hosts:
    """The hosts that the page answers to, and without keys on loopback all else (router/surfaces/known_host.py)."""

    def __init__(self, config: Router):
        self._known = {config.host.lower(), *config.ui_hosts}

    def check(self, header: str, what: str = "this page") -> None:
        """Raises InvalidInput if the browser was given another name. `what`: is not served under it."""
        host = host_names.named(header)
        if not (host_names.ANY in self._known or host in self._known or host_names.cannot_be_rebound(host)):
            raise InvalidInput(
                f"{what} is not served under {host[:64]!r}",
                field="host",
                fix="open it by an IP address or as localhost, or add the name to router.ui_hosts",
            )


def _guarded(hosts: Hosts, endpoint: _Endpoint) -> _Endpoint:
    async def guarded(request: Request) -> Response:
        try:
            hosts.check(request.headers.get("host", ""))
            response = await endpoint(request)
        except PrefillShareError as error:
            response = response_of(HttpError.of(error))
        response.headers.update(HEADERS)
        return response

    return guarded


def _file(path: Path) -> _Endpoint:
    """Read once. Browsers ask each time whether it has changed, and keep it if not."""
    content, kind = path.read_bytes(), _KINDS[path.suffix]
    headers = {"etag": f'"{hashlib.sha256(content).hexdigest()[:16]}"', "cache-control": "no-cache"}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return answer
