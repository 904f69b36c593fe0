"""What is too large is refused before anything inside has seen a byte of it."""

import asyncio

import httpx
import pytest

from prefillshare.kvshare.config import Base, Router
from prefillshare.router.surfaces.http_limits import HttpLimits
from prefillshare.router.surfaces.request_limits import HEADER_BYTES, LEAST_BODY_BYTES, RequestLimits

LIMITS = RequestLimits(body_bytes=1000, header_bytes=500)


class Inside:
    """An app that reads the whole body, and keeps count."""

    def __init__(self):
        self.calls, self.read = 0, 0

    async def __call__(self, scope, receive, send):
        self.calls += 1
        more = True
        while more:
            message = await receive()
            self.read += len(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"read"})


@pytest.fixture
def inside():
    return Inside()


def post(app, **request) -> httpx.Response:
    async def ask():
        transport = httpx.ASGITransport(HttpLimits(app, LIMITS))
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            return await client.post("/v1/completions", **request)

    return asyncio.run(ask())


def pieces(count: int, size: int):
    async def generate():
        for _ in range(count):
            yield b"x" * size

    return generate()


def test_a_body_of_the_limit_is_read(inside):
    assert post(inside, content=b"x" * 1000).text == "read"
    assert inside.read == 1000


def test_a_body_announced_as_larger_reaches_nobody(inside):
    response = post(inside, content=b"x" * 1001)
    assert (response.status_code, inside.calls) == (413, 0)
    error = response.json()["error"]
    assert error["code"] == 413
    assert error["message"] == (
        "the body has 1001 bytes; at most 1000 bytes are taken (fix: send less, or raise router.max_request_bytes)"
    )


def test_a_body_that_does_not_say_how_large_it_is_is_cut_off_where_it_gets_larger(inside):
    response = post(inside, content=pieces(1000, 100))
    assert (response.status_code, inside.calls) == (413, 1)
    assert inside.read == 1000


def test_a_length_that_is_a_lie_changes_nothing(inside):
    response = post(inside, content=pieces(20, 100), headers={"content-length": "5"})
    assert response.status_code == 413
    assert inside.read == 1000


def test_headers_of_more_than_the_limit_together_reach_nobody(inside):
    response = post(inside, headers={f"x-{n}": "v" * 90 for n in range(6)})
    assert (response.status_code, inside.calls) == (431, 0)
    assert "at most 500" in response.json()["error"]["message"]


def test_limits_follow_the_models_length_unless_the_file_says_otherwise():
    def limit(length: int, **router) -> int:
        return RequestLimits.of(Router(**router), Base(model="m", max_model_len=length)).body_bytes

    assert limit(4096) == LEAST_BODY_BYTES == 1 << 20
    assert limit(131072) == 64 * 131072
    assert limit(131072, max_request_bytes=5000) == 5000
    assert RequestLimits.of(Router(), Base(model="m")).header_bytes == HEADER_BYTES
