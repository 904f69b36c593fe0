"""Web pages of the origins that the deployment file names may call the HTTP surface, and read its refusals; others may not."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from prefillshare.kvshare.config import Router
from prefillshare.kvshare.errors import Overloaded
from prefillshare.kvshare_vllm.surface.http_refusals import HttpRefusals, note_failure
from prefillshare.router.surfaces.cors import cors
from prefillshare.router.surfaces.http_auth import ApiKeys
from prefillshare.router.tenants import KeysFile, Tenants

KEY = "psk-first-tenants-key"
TENANTS = Tenants(KeysFile.model_validate({"tenants": {"research": {"keys": [KEY]}}}).tenants)
PAGE, OTHER = "https://chat.example", "https://evil.example"
AS_PAGE = {"origin": PAGE, "authorization": f"Bearer {KEY}"}


def surface(*origins: str) -> httpx.AsyncClient:
    """The middleware of the router in its order, around an app that answers, streams and refuses."""

    async def whole(request):
        return JSONResponse({})

    async def stream(request):
        async def events():
            for number in range(3):
                yield f"data: {number}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def refused(request):
        async def events():
            note_failure(Overloaded("no room", retry_after_s=6.2))
            yield "data: {}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[
        Route(f"/{way.__name__}", way, methods=["POST"]) for way in (whole, stream, refused)
    ])  # fmt: skip
    app = ApiKeys(app, TENANTS)
    for wrap in (*cors(origins), HttpRefusals):
        app = wrap(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")


def asked(origin: str, **headers) -> dict[str, str]:
    return {"origin": origin, "access-control-request-method": "POST", **headers}


@pytest.mark.parametrize(("origins", "allowed"), [((PAGE,), PAGE), ((OTHER, PAGE), PAGE), (("*",), "*")])
async def test_a_page_is_told_without_a_key_what_it_may_send(origins, allowed):
    wanted = {"access-control-request-headers": "authorization, content-type, x-prefillshare-cache-domain"}
    async with surface(*origins) as http:
        answer = await http.options("/whole", headers=asked(PAGE, **wanted))
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, allowed)
    assert "POST" in answer.headers["access-control-allow-methods"]
    for header in ("authorization", "content-type", "x-prefillshare-cache-domain"):
        assert header in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(("path", "status"), [("/whole", 200), ("/stream", 200), ("/refused", 429), ("/nothing", 404)])
async def test_a_page_may_read_answers_streams_and_refusals(path, status):
    async with surface(PAGE) as http:
        answer = await http.post(path, headers=AS_PAGE)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        if path == "/stream":
            assert answer.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
        if path == "/refused":
            assert answer.headers["retry-after"] == "7"


async def test_a_page_may_read_that_its_key_is_wrong():
    async with surface(PAGE) as http:
        answer = await http.post("/whole", headers={"origin": PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, PAGE)


@pytest.mark.parametrize("origins", [(PAGE,), ()])
async def test_other_pages_may_read_nothing(origins):
    async with surface(*origins) as http:
        asking = await http.options("/whole", headers=asked(OTHER))
        answer = await http.post("/whole", headers=AS_PAGE | {"origin": OTHER})
    assert asking.status_code in (400, 405)
    for one in (asking, answer):
        assert "access-control-allow-origin" not in one.headers


async def test_without_origins_nothing_is_put_around_the_app():
    assert cors(Router().cors_origins) == []


@pytest.mark.parametrize(
    "origins",
    [["*"], ["https://chat.example"], ["http://localhost:3000", "http://[::1]:3000"], ["vscode-webview://abc"]],
)
def test_origins_are_taken_as_browsers_name_them(origins):
    assert Router(cors_origins=origins).cors_origins == tuple(origins)


@pytest.mark.parametrize(
    ("origins", "text"),
    [
        (["https://chat.example/"], 'browsers name it "https://chat.example"'),
        (["https://chat.example/app"], 'browsers name it "https://chat.example"'),
        (["https://Chat.example:443"], 'browsers name it "https://chat.example"'),
        (["chat.example"], "'chat.example' is no origin"),
        (["https://*.example"], "'https://*.example' is no origin"),
        (["https://user@chat.example"], "is no origin"),
        (["https://chat.example:port"], "is no origin"),
        ([""], "'' is no origin"),
        (["null"], "'null' is no origin"),
        (["*", "https://chat.example"], "allows every origin; remove the others"),
    ],
)
def test_what_no_browser_would_name_is_refused(origins, text):
    with pytest.raises(ValueError, match="cors_origins") as refused:
        Router(cors_origins=origins)
    assert text in str(refused.value)
