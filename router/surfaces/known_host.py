"""A router that takes no keys and listens on loopback answers under names of this machine only.

Such a router is for those who sit at the machine, and one of them is a browser: a web site that points a name of its own at
127.0.0.1 (kvshare/host_names.py) could otherwise have it send turns and read their answers. With keys, a web site has none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from starlette.datastructures import Headers

from prefillshare.kvshare.config import Router
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare.loopback import is_loopback
from prefillshare.kvshare_vllm.surface.http_errors import HttpError, refuse
from prefillshare.router.tenants import Tenants
from prefillshare.router.ui.page import Hosts


def known_host(config: Router, tenants: Tenants) -> list[Callable]:
    """Middleware to put around all else. Empty where others may come, or keys are needed."""
    return [partial(KnownHost, hosts=Hosts(config))] if is_loopback(config.host) and tenants.are_all_anonymous else []


class KnownHost:
    """ASGI middleware."""

    def __init__(self, app, hosts: Hosts):
        self._app, self._hosts = app, hosts

    async def __call__(self, scope, receive, send):
        host = None if scope["type"] == "lifespan" else Headers(scope=scope).get("host")
        if host is not None:  # every browser names one
            try:
                self._hosts.check(host, "a router without API keys")
            except InvalidInput as error:
                return await refuse(HttpError.of(error), scope, receive, send)
        await self._app(scope, receive, send)
