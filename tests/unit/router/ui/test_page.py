"""The page's routes: what is open, what a browser may load, hosts that it answers to, what `router.ui` leaves out."""

import json
import re
from pathlib import Path

import httpx
import pytest
from double.page import app_of
from double.system import system
from virtual_time import on_virtual_time

from prefillshare.kvshare.caller import Caller
from prefillshare.router.surfaces.http_auth import OPEN as OPEN_PATHS
from prefillshare.router.tenants import KeysFile, Tenants
from prefillshare.router.ui import page
from prefillshare.router.ui.page import DATA, FILES, HEADERS, OPEN, PAGE

KEY, OTHER = "psk-first-tenants-key", "psk-second-tenants-key"
TENANTS = Tenants(KeysFile.model_validate({"tenants": {"research": {"keys": [KEY]}, "support": {"keys": [OTHER]}}}).tenants)
PROMPT = list(range(20, 57))
STATIC = Path(page.__file__).parent / "static"


def client(running, tenants=None, **router) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_of(running, tenants, **router))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


def with_key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@on_virtual_time
async def test_the_page_and_what_it_is_made_of_are_served_as_they_are():
    async with system(1) as running, client(running, ui="full") as http:
        for path in (PAGE, *(f"{PAGE}/{name}" for name in FILES if name != "index.html")):
            answer = await http.get(path)
            assert answer.status_code == 200, path
            assert answer.content == (STATIC / (path.removeprefix(PAGE).lstrip("/") or "index.html")).read_bytes()
        assert (await http.get(PAGE)).headers["content-type"] == "text/html; charset=utf-8"
        assert (await http.get("/ui/main.js")).headers["content-type"].startswith("text/javascript")
        assert (await http.get("/ui/")).headers["location"] == "../ui"
        for path in ("/ui/index.html", "/ui/../feed.py", "/ui/static/main.js", "/ui/page.py", "/ui/nothing"):
            assert (await http.get(path)).status_code == 404, path
        assert (await http.post(PAGE)).status_code == 405


@on_virtual_time
async def test_a_file_that_has_not_changed_is_not_sent_again():
    async with system(1) as running, client(running) as http:
        first = await http.get("/ui/style.css")
        again = await http.get("/ui/style.css", headers={"if-none-match": first.headers["etag"]})
        other = await http.get("/ui/layout.css", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content, other.status_code) == (304, b"", 200)
    assert first.headers["cache-control"] == "no-cache"


@on_virtual_time
async def test_a_browser_is_told_to_load_nothing_from_elsewhere_and_to_make_no_markup_of_text():
    async with system(1) as running, client(running) as http:
        for path in (PAGE, "/ui/main.js", DATA):
            answer = await http.get(path)
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["content-security-policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'self'", "'none'", "'script'"}, "no outside host, nothing inline"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host_or_makes_markup_of_text(name):
    text = (STATIC / name).read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]", text)
    assert not re.search(r"(inner|outer|Adjacent)HTML|document\.write|\beval\b|(local|session)Storage|cookie", text)
    assert max(map(len, text.splitlines())) <= 128 or name.endswith(".svg")
    assert len(text.splitlines()) < 400


def test_every_file_that_the_page_refers_to_is_there():
    wanted = set(re.findall(r'(?:href|src)="ui/([^"]+)"', (STATIC / "index.html").read_text()))
    for name in (name for name in FILES if name.endswith(".js")):
        wanted |= set(re.findall(r'"\./([^"]+)"', (STATIC / name).read_text()))
    assert wanted == set(FILES) - {"index.html"}


@on_virtual_time
async def test_off_serves_none_of_it_and_keeps_no_turns():
    async with system(1, ui="off") as running, client(running, ui="off") as http:
        await running.turn("a", PROMPT)
        assert running.orchestrator.services.recent.since("", 0).turns == []
        for path in (PAGE, "/ui/", "/ui/main.js", DATA):
            assert (await http.get(path)).status_code == 404


@on_virtual_time
async def test_the_playground_is_only_there_in_full():
    async with system(1) as running:
        for ui, status in (("read", 404), ("full", 200)):
            async with client(running, ui=ui) as http:
                assert (await http.get("/ui/playground.js")).status_code == status
                assert (await http.get(DATA)).json()["ui"] == ui


# Keys


@on_virtual_time
async def test_without_a_key_nothing_of_any_tenant_is_shown():
    async with system(1) as running, client(running, TENANTS) as http:
        async for _ in running.run("a", PROMPT, 3, Caller("research", "research"), session="secret-session"):
            pass
        shell = [await http.get(PAGE), await http.get("/ui/main.js")]
        refused = [await http.get(DATA), await http.get(DATA, headers=with_key("psk-nobodys-key-at-all"))]
        mine, theirs = [(await http.get(DATA, headers=with_key(key))).json() for key in (KEY, OTHER)]
    assert [answer.status_code for answer in shell + refused] == [200, 200, 401, 401]
    for answer in shell + refused:
        assert "secret-session" not in answer.text
        assert "research" not in answer.text
    assert refused[0].json()["error"]["message"].startswith("no API key is given")
    assert (mine["tenant"], [turn["session"] for turn in mine["turns"]]) == ("research", ["secret-session"])
    assert (theirs["tenant"], theirs["turns"]) == ("support", [])
    assert OPEN < OPEN_PATHS
    assert DATA not in OPEN_PATHS


@on_virtual_time
async def test_without_tenants_the_data_needs_no_key():
    async with system(1) as running, client(running) as http:
        answer = await http.get(DATA)
    assert (answer.status_code, answer.json()["tenant"], answer.headers["cache-control"]) == (200, "", "no-store")


@on_virtual_time
async def test_names_that_are_no_text_are_shown_as_well_as_can_be():
    async with system(1) as running, client(running) as http:
        await running.turn("a", PROMPT, session="half \ud800 a character")
        (turn,) = (await http.get(DATA)).json()["turns"]
    assert turn["session"] == "half ? a character"


# Hosts


@pytest.mark.parametrize("path", [PAGE, "/ui/main.js", "/ui/", DATA])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""])
@on_virtual_time
async def test_a_host_that_somebody_else_may_own_is_refused_by_field(path, host):
    async with system(1) as running, client(running) as http:
        answer = await http.get(path, headers={"host": host})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == ("host", 400, "BadRequestError")
    assert error["message"].startswith(f"host: this page is not served under '{host.split(':')[0]}' (fix: ")
    assert "router.ui_hosts" in error["message"]
    assert answer.headers["content-security-policy"] == HEADERS["content-security-policy"]


@pytest.mark.parametrize(
    ("host", "router"),
    [
        ("localhost:8000", {}),
        ("127.0.0.1:8000", {}),
        ("[::1]:8000", {}),
        ("10.1.2.3:8000", {"host": "0.0.0.0"}),
        ("gpu-box:8000", {"host": "gpu-box"}),
        ("GPU-box.:8000", {"host": "GPU-Box"}),
        ("agents.example", {"ui_hosts": ["agents.example"]}),
        ("anything.example", {"ui_hosts": ["*"]}),
    ],
)
@on_virtual_time
async def test_hosts_that_the_router_is_known_by_are_answered(host, router):
    async with system(1) as running, client(running, **router) as http:
        for path in (PAGE, DATA):
            assert (await http.get(path, headers={"host": host})).status_code == 200


@on_virtual_time
async def test_a_very_long_host_is_not_repeated_whole():
    async with system(1) as running, client(running) as http:
        answer = await http.get(DATA, headers={"host": "x" * 9_999})
    assert (answer.status_code, len(answer.text) < 400) == (400, True)


@on_virtual_time
async def test_a_wrong_question_is_a_typed_error_that_names_the_field():
    async with system(1) as running, client(running) as http:
        answer = await http.get(DATA, params={"known": "everything"})
        long = await http.get(DATA, params={"known": ",".join(f"{number:08x}.1" for number in range(999))})
    for one in (answer, long):
        assert (one.status_code, one.json()["error"]["param"]) == (400, "known")
    assert json.loads(answer.content)["error"]["message"].startswith("known: this is no list of revisions (fix: leave it out")
