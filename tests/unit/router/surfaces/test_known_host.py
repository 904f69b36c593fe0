"""A router without keys on loopback answers under names that no web site can point at it; others answer under any."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from prefillshare.kvshare.config import Router
from prefillshare.router.surfaces.known_host import known_host
from prefillshare.router.tenants import KeysFile, Tenants

TENANTS = Tenants(KeysFile.model_validate({"tenants": {"research": {"keys": ["psk-first-tenants-key"]}}}).tenants)
PATHS = ("/v1/chat/completions", "/metrics", "/health")


def surface(tenants: Tenants = Tenants(), **config):  # noqa: B008
    async def serve(request):
        return JSONResponse({})

    app = Starlette(routes=[Route(path, serve, methods=["GET", "POST"]) for path in PATHS])
    for wrap in known_host(Router(**config), tenants):
        app = wrap(app)
    return app


async def status(app, host: str, path: str = PATHS[0]) -> int:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as http:
        answer = await http.post(path, headers={"host": host}, json={})
    if answer.status_code != 200:
        assert answer.json()["error"]["param"] == "host"
        assert "router.ui_hosts" in answer.json()["error"]["message"]
    return answer.status_code


@pytest.mark.parametrize("path", PATHS)
async def test_a_name_that_a_web_site_may_own_is_refused_by_field_wherever_it_asks(path):
    assert await status(surface(), "rebound.example:8000", path) == 400


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "agents.localhost"])
async def test_this_machines_own_names_are_known(host):
    assert await status(surface(), host) == 200


async def test_a_name_that_the_deployment_file_gives_is_known():
    assert await status(surface(ui_hosts=["agents.example"]), "agents.example") == 200


@pytest.mark.parametrize(("tenants", "config"), [(TENANTS, {}), (Tenants(), {"host": "0.0.0.0"})])
async def test_with_keys_or_where_other_machines_come_any_name_will_do(tenants, config):
    assert await status(surface(tenants, **config), "agents.example") == 200


def test_a_web_socket_is_refused_too():
    client = TestClient(surface(), base_url="http://rebound.example")
    with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect("/v1/realtime"):
        pass
    assert refused.value.code == 1008
