"""API keys on the HTTP surface: the middleware around an app that serves as vLLM's does, and tells who calls."""

import asyncio
import functools
import logging

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from prefillshare.kvshare.caller import ANONYMOUS, cache_salt, current_caller
from prefillshare.router.surfaces.http_auth import DOMAIN_HEADER, OPEN, PRIORITY_HEADER, ApiKeys
from prefillshare.router.tenants import KeysFile, Tenants

KEY, OTHER, WRONG = "psk-first-tenants-key", "psk-second-tenants-key", "psk-nobodys-key-at-all"
FILE = {"tenants": {"research": {"keys": [KEY], "may_share": ["handbook"], "priority": 2}, "support": {"keys": [OTHER]}}}
TWO = Tenants(KeysFile.model_validate(FILE).tenants)


def in_a_task(handler):
    """As vLLM runs its handlers (vllm/entrypoints/serve/utils/api_utils.py: with_cancellation)."""

    @functools.wraps(handler)
    async def wrapper(*args, **kwargs):
        return await asyncio.create_task(handler(*args, **kwargs))

    return wrapper


def described() -> dict:
    caller = current_caller.get()
    return {"tenant": caller.tenant, "domain": caller.cache_domain, "priority": caller.priority}


@pytest.fixture
def app():
    app = FastAPI()

    @app.post("/v1/whole")
    @in_a_task
    async def whole(raw_request: Request):
        await raw_request.body()
        return described()

    @app.post("/v1/stream")
    @in_a_task
    async def stream(raw_request: Request):
        async def pieces():  # not before the handler has returned
            for _ in range(2):
                await asyncio.sleep(0)
                yield await asyncio.create_task(tenant()) + "\n"

        async def tenant():
            return current_caller.get().tenant

        return StreamingResponse(pieces())

    for path in OPEN:
        if path not in {route.path for route in app.routes}:
            app.add_api_route(path, described)
    return app


def client(app, tenants=TWO) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(ApiKeys(app, tenants)), base_url="http://router")


def with_key(key: str, **headers) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", **headers}


async def test_each_request_runs_as_its_keys_tenant_in_tasks_and_streams_too(app):
    async with client(app) as http:
        assert (await http.post("/v1/whole", headers=with_key(KEY))).json() == {
            "tenant": "research", "domain": "research", "priority": 2,
        }
        assert (await http.post("/v1/stream", headers=with_key(OTHER))).text == "support\nsupport\n"
        assert (await http.post("/v1/whole", headers={"x-api-key": OTHER})).json()["tenant"] == "support"
    assert current_caller.get() is ANONYMOUS


async def test_concurrent_requests_do_not_see_each_others_tenant(app):
    async with client(app) as http:
        answers = await asyncio.gather(*(http.post("/v1/stream", headers=with_key(key)) for key in (KEY, OTHER) * 8))
    assert [answer.text for answer in answers] == ["research\nresearch\n", "support\nsupport\n"] * 8


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "no API key is given"),
        (with_key(""), "no API key is given"),
        ({"authorization": f"Basic {KEY}"}, "no API key is given"),
        (with_key(WRONG), "no tenant has this API key"),
        ({"x-api-key": WRONG}, "no tenant has this API key"),
        (with_key(WRONG, **{"x-api-key": KEY}), "no tenant has this API key"),
    ],
)
async def test_refusal_is_a_401_as_openai_clients_know_it_and_does_not_show_the_key(app, headers, message, caplog):
    caplog.set_level(logging.DEBUG)
    async with client(app) as http:
        answer = await http.post("/v1/whole", headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("Unauthorized", None, 401)
    assert error["message"].startswith(message)
    assert WRONG not in answer.text + caplog.text


async def test_the_priority_header_lets_the_tenants_others_go_first_and_never_the_request_before_them(app):
    async with client(app) as http:
        for steps, priority in (("0", 2), ("7", 9), ("100", 100)):
            answer = await http.post("/v1/whole", headers=with_key(KEY, **{PRIORITY_HEADER: steps}))
            assert answer.json()["priority"] == priority
        for steps in ("-1", "101", "high", "", "1.5"):
            answer = await http.post("/v1/whole", headers=with_key(KEY, **{PRIORITY_HEADER: steps}))
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (400, "BadRequestError")
            assert error["message"].startswith(f"{PRIORITY_HEADER}: ")
            assert "0 to 100" in error["message"]


async def test_openais_client_raises_its_own_errors(app):
    openai = pytest.importorskip("openai")

    def asking(key):
        return openai.AsyncOpenAI(api_key=key, base_url="http://router/v1", max_retries=0, http_client=client(app))

    with pytest.raises(openai.AuthenticationError, match="no tenant has this API key"):
        await asking(WRONG).models.list()
    with pytest.raises(openai.PermissionDeniedError, match="cache domain") as caught:
        await asking(KEY).with_options(default_headers={DOMAIN_HEADER: "support"}).models.list()
    assert caught.value.body["param"] == "cache_domain"
    with pytest.raises(openai.NotFoundError):  # past the gate: the app has no such route
        await asking(KEY).models.list()


@pytest.mark.parametrize("path", sorted(OPEN))
async def test_open_paths_take_no_key_and_have_no_tenant(app, path):
    async with client(app) as http:
        for headers in ({}, with_key(WRONG)):
            answer = await http.get(path, headers=headers)
            assert answer.status_code == 200
            assert "research" not in answer.text


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/tokenize", "/health/", "//health", "/health/../v1/whole", "/metrics/x", "/HEALTH", "/nothing"]
)
async def test_every_other_path_takes_one_whether_it_exists_or_not(app, path):
    async with client(app) as http:
        assert (await http.get(path)).status_code == 401


async def test_browsers_may_ask_what_they_may_send(app):
    async with client(app) as http:
        assert (await http.options("/v1/whole")).status_code == 405


async def test_header_picks_a_shared_domain_for_one_request(app):
    async with client(app) as http:
        chosen = (await http.post("/v1/whole", headers=with_key(KEY, **{DOMAIN_HEADER: "handbook"}))).json()
        own = (await http.post("/v1/whole", headers=with_key(KEY))).json()
        denied = await http.post("/v1/whole", headers=with_key(OTHER, **{DOMAIN_HEADER: "handbook"}))
    assert (chosen["tenant"], chosen["domain"], own["domain"]) == ("research", "handbook", "research")
    assert len({cache_salt(domain) for domain in ("handbook", "research", "support")}) == 3
    assert denied.status_code == 403
    assert denied.json()["error"]["param"] == "cache_domain"
    assert denied.json()["error"]["type"] == "Forbidden"


@pytest.mark.parametrize("name", ["api_key", "key", "x-api-key", "authorization", "token"])
async def test_a_key_in_the_address_opens_nothing(app, name):
    async with client(app) as http:
        for value in (KEY, f"Bearer {KEY}"):
            assert (await http.post("/v1/whole", params={name: value})).status_code == 401


async def test_without_tenants_everything_is_as_it_was(app):
    async with client(app, Tenants()) as http:
        for headers in ({}, with_key("unused")):
            answer = await http.post("/v1/whole", headers=headers)
            assert answer.json() == {"tenant": "", "domain": "", "priority": 0}
        assert (await http.post("/v1/whole", headers={DOMAIN_HEADER: "handbook"})).status_code == 403


async def test_websockets_without_a_key_are_closed_before_they_open(app):
    sent = []

    async def send(message):
        sent.append(message)

    await ApiKeys(app, TWO)({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]


async def test_the_apps_start_and_end_pass(app):
    scopes = []

    async def inner(scope, receive, send):
        scopes.append(scope["type"])

    await ApiKeys(inner, TWO)({"type": "lifespan"}, None, None)
    assert scopes == ["lifespan"]
