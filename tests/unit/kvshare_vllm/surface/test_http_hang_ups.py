"""A client that hangs up ends its request: the app is told so in the way it listens for, and cancelled if it does not."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from prefillshare.kvshare_vllm.surface import http_hang_ups
from prefillshare.kvshare_vllm.surface.http_hang_ups import HangUps

HTTP = {"type": "http"}
START = {"type": "http.response.start", "status": 200, "headers": []}


async def nothing_more():
    """A client that has sent all it had to send, and waits."""
    await asyncio.Event().wait()


class Client:
    """What it was sent."""

    def __init__(self):
        self.got = []

    async def send(self, message):
        self.got.append(message)


async def served(app, client, *, receive=nothing_more) -> asyncio.Task:
    """The request's task, as Serve has it, once the app has begun."""
    begun = asyncio.Event()

    async def watched(scope, receive, send):
        begun.set()
        await app(scope, receive, send)

    task = asyncio.create_task(HangUps(watched)(HTTP, receive, client.send))
    await begun.wait()
    return task


async def hang_up(task) -> None:
    """As Serve does, and wait until all is over."""
    task.cancel()
    async with asyncio.timeout(5):
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def test_an_app_that_listens_is_told_and_not_cancelled_and_what_it_then_sends_is_dropped():
    ended, client = [], Client()

    async def app(scope, receive, send):
        await send(START)
        for _ in range(2):
            ended.append((await receive())["type"])
        await send({"type": "http.response.body", "body": b"nobody hears this"})
        ended.append("by itself")

    await hang_up(await served(app, client))
    assert ended == ["http.disconnect", "http.disconnect", "by itself"]
    assert client.got == [START]


async def test_an_app_that_does_not_listen_is_cancelled(monkeypatch):
    monkeypatch.setattr(http_hang_ups, "PATIENCE_S", 0.01)
    ended = []

    async def app(scope, receive, send):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    await hang_up(await served(app, Client()))
    assert ended == ["cancelled"]


async def test_an_app_that_is_slow_to_hear_of_it_leaves_no_handler_behind(monkeypatch):
    """vLLM's way to end a handler: cancelled itself while it listens, it would leave the handler running to its end."""
    monkeypatch.setattr(http_hang_ups, "PATIENCE_S", 0.01)
    ended = []

    @with_cancellation
    async def handler(body, raw_request):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("handler")

    async def app(scope, receive, send):
        async def busy():
            """The loop has much else to do between the disconnect and who listens for it."""
            message = await receive()
            await asyncio.sleep(0.1)
            return message

        await handler(None, SimpleNamespace(receive=busy, app=SimpleNamespace(state=SimpleNamespace())))

    await hang_up(await served(app, Client()))
    assert ended == ["handler"]


async def test_what_is_left_behind_is_told(monkeypatch):
    """Whether it asks before the client hangs up or after, and whatever becomes of the app."""
    monkeypatch.setattr(http_hang_ups, "PATIENCE_S", 0)
    behind, asks, go_on = [], asyncio.Event(), asyncio.Event()

    async def left_behind(after: asyncio.Event):
        told = asyncio.Event()
        await after.wait()
        with http_hang_ups.told_of_hang_up(told.set):
            asks.set()
            await told.wait()

    async def app(scope, receive, send):
        at_once = asyncio.Event()
        at_once.set()
        behind.extend(asyncio.create_task(left_behind(after)) for after in (at_once, go_on))
        await asyncio.Event().wait()

    task = await served(app, Client())
    await asks.wait()
    await hang_up(task)
    go_on.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*behind)


async def test_what_ends_before_is_not_told():
    told = []

    async def app(scope, receive, send):
        with http_hang_ups.told_of_hang_up(lambda: told.append("too late")):
            pass
        await asyncio.Event().wait()

    await hang_up(await served(app, Client()))
    with http_hang_ups.told_of_hang_up(lambda: told.append("no request")):
        await asyncio.sleep(0)
    assert told == []


async def test_an_app_that_hears_of_it_and_goes_on_is_cancelled_in_the_end(monkeypatch):
    monkeypatch.setattr(http_hang_ups, "PATIENCE_S", 0.01)
    monkeypatch.setattr(http_hang_ups, "LONGEST_S", 0.05)
    ended = []

    async def app(scope, receive, send):
        await receive()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    await hang_up(await served(app, Client()))
    assert ended == ["cancelled"]


async def test_an_app_that_is_told_while_a_second_cancel_comes_is_cancelled_at_once(monkeypatch):
    monkeypatch.setattr(http_hang_ups, "PATIENCE_S", 60)
    ended = []

    async def app(scope, receive, send):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    task = await served(app, Client())
    task.cancel()
    await asyncio.sleep(0)
    await hang_up(task)
    await asyncio.sleep(0)
    assert ended == ["cancelled"]


async def test_messages_pass_both_ways_while_the_client_is_there():
    client = Client()
    coming = iter([{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request", "body": b"b"}])

    async def receive():
        return next(coming)

    async def app(scope, receive, send):
        body = (await receive())["body"] + (await receive())["body"]
        await send(START)
        await send({"type": "http.response.body", "body": body})

    await (await served(app, client, receive=receive))
    assert client.got == [START, {"type": "http.response.body", "body": b"ab"}]


async def test_what_the_app_raises_is_raised():
    async def app(scope, receive, send):
        raise ZeroDivisionError("the app's")

    with pytest.raises(ZeroDivisionError, match="the app's"):
        await (await served(app, Client()))


async def test_other_than_http_passes_as_it_is():
    seen = []

    async def app(scope, receive, send):
        seen.append((receive, send))

    await HangUps(app)({"type": "lifespan"}, nothing_more, nothing_more)
    assert seen == [(nothing_more, nothing_more)]
