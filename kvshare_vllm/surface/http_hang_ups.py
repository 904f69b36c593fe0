"""A request whose client has hung up ends, whatever it was doing, and nothing of it is left behind.

Serve cancels the task that serves such a request. vLLM's handlers run in tasks of their own and end when they receive
`http.disconnect`. If they are cancelled while they wait for it, they leave their task running to its end, for nobody. So this
ASGI middleware, outside of all others, tells the app in the way that it listens for:

 1. The app runs in a task of its own, which Serve does not know.
 2. When Serve cancels the request, the app receives `http.disconnect`. What it still sends is dropped.
 3. An app that does not listen, and has not ended after PATIENCE_S, is cancelled. An app that listens is about to end, but how
    soon it receives the message depends on what else the event loop has to do. It would leave its handler behind if it were
    cancelled before that, so it is given LONGEST_S.
 4. A handler is left behind all the same if it is cancelled after it has begun and before it first listens; on a busy loop some
    time passes in between. So what generates for it is told, too (`told_of_hang_up`).

Seam: vllm/entrypoints/serve/utils/api_utils.py (with_cancellation), ray/serve/_private/replica.py (_call_http_entrypoint)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

logger = logging.getLogger(__name__)

PATIENCE_S, LONGEST_S = 0.5, 30.0

_DISCONNECT = {"type": "http.disconnect"}

#: The future of the HTTP request that is being served; done when its client has hung up.
_hung_up: ContextVar[asyncio.Future | None] = ContextVar("hung_up", default=None)


@contextmanager
def told_of_hang_up(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` if the client hangs up meanwhile, or has hung up already. May be entered in any task of the request."""
    hung_up = _hung_up.get()
    if hung_up is None:
        yield
        return

    def called(_: asyncio.Future) -> None:
        tell()

    hung_up.add_done_callback(called)
    try:
        yield
    finally:
        hung_up.remove_done_callback(called)


class HangUps:
    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        client = _Client(receive, send)
        _hung_up.set(client.hung_up)
        serving = asyncio.create_task(self._app(scope, client.receive, client.send))
        try:
            await asyncio.wait({serving})
        except asyncio.CancelledError:
            client.hung_up.set_result(None)
            await _end(serving, client)
            raise
        serving.result()


class _Client:
    """The app's way to its client, until that has hung up."""

    def __init__(self, receive, send):
        self._receive, self._send = receive, send
        self.hung_up = asyncio.get_running_loop().create_future()
        #: The app waits for a message, or has been told that there will be none.
        self.is_heard = False

    async def receive(self):
        self.is_heard = True
        if self.hung_up.done():
            return _DISCONNECT
        message = asyncio.ensure_future(self._receive())
        try:
            await asyncio.wait({message, self.hung_up}, return_when=asyncio.FIRST_COMPLETED)
            self.is_heard = not message.done()
            return message.result() if message.done() else _DISCONNECT
        except asyncio.CancelledError:
            self.is_heard = False
            raise
        finally:
            message.cancel()

    async def send(self, message) -> None:
        if not self.hung_up.done():
            await self._send(message)


async def _end(serving: asyncio.Task, client: _Client) -> None:
    """Wait for the app to end by itself, or else cancel it. Afterwards it has ended, or does nothing more for long."""
    try:
        await asyncio.wait({serving}, timeout=PATIENCE_S)
        if client.is_heard:
            await asyncio.wait({serving}, timeout=LONGEST_S)
    finally:
        serving.cancel()
    await asyncio.wait({serving}, timeout=PATIENCE_S)
    if serving.done() and not serving.cancelled() and (error := serving.exception()):
        logger.info("a request whose client had hung up ended with %s: %s", type(error).__name__, error)
