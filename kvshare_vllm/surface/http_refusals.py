"""Refusals over HTTP as clients expect them: with a status of their own, even if a stream was asked for, and Retry-After.

vLLM starts a streamed response, and sends events, before the turn has been admitted: a refusal would come after a 200, in a
shape that depends on the surface, or the body would just end. So the frontend notes what becomes of a request's turns, and
this ASGI middleware holds the start of a stream until one of them has its first tokens. A failure before that becomes the
response; one after it becomes the stream's last event, whatever vLLM would have said. All errors pass here, so that each
surface has its clients' shape (kvshare_vllm/surface/http_errors.py).

Seam: vllm/entrypoints/{openai,anthropic}: a chunk of a streamed body is an event
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError

from prefillshare.kvshare.errors import InvalidInput, NotFound, Overloaded, PrefillShareError
from prefillshare.kvshare_vllm.surface import http_errors
from prefillshare.kvshare_vllm.surface.http_errors import HttpError

#: Most events of a stream that are held: vLLM sends two before a turn's first tokens.
_MAX_HELD = 8


@dataclass
class _Turns:
    """The turns of one request: whether one of them generates, and the first failure."""

    begun: bool = False
    failure: PrefillShareError | None = None


_turns: ContextVar[_Turns | None] = ContextVar("prefillshare_http_turns", default=None)


def note_begun() -> None:
    """A turn of the request being served has its first tokens."""
    if turns := _turns.get():
        turns.begun = True


def note_failure(error: PrefillShareError) -> None:
    """The request being served is refused, or fails; the first failure is what its client is told."""
    if (turns := _turns.get()) and turns.failure is None:
        turns.failure = error


@contextmanager
def unnoted() -> Iterator[None]:
    """Within this context, what fails is not a failure of the request being served."""
    token = _turns.set(None)
    try:
        yield
    finally:
        _turns.reset(token)


def to_vllm(error: PrefillShareError) -> Exception:
    """Our errors as vLLM's HTTP layer knows them."""
    note_failure(error)
    if isinstance(error, NotFound):
        return VLLMNotFoundError(str(error))
    if isinstance(error, InvalidInput) and error.http_status == 400:
        return VLLMValidationError(str(error), parameter=error.field)
    return GracefulHTTPError(str(error), HTTPStatus(error.http_status))


class HttpRefusals:
    """ASGI middleware, around all others but those that add headers to every response."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        turns = _Turns()
        answer = _Answer(send, http_errors.surface_of(scope["path"]), turns)
        token = _turns.set(turns)
        try:
            await self._app(scope, receive, answer.take)
        except Exception:
            await answer.broken_off()
            if turns.failure is None:  # a failure that was noted has been answered
                raise
        finally:
            _turns.reset(token)


class _Answer:
    """A response on its way out. `take` gets what the app sends; nothing follows an error."""

    def __init__(self, send, surface: http_errors.OpenAI, turns: _Turns):
        self._send, self._surface, self._turns = send, surface, turns
        self._start: dict | None = None
        self._held: list[dict] = []
        self._is_stream = self._is_error = self._is_held = self._ended = False
        self._events, self._first = 0, b""

    async def take(self, message: dict) -> None:
        if self._ended:
            return
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._is_error:
            await self._collect(message)
        elif self._is_stream:
            await self._event(message)
        else:
            await self._send(message)

    async def broken_off(self) -> None:
        """The app raised. A response that has not ended yet ends with an error, if one can still be told."""
        if not self._ended and self._is_stream:
            await self._fail(self._failure() or http_errors.unforeseen())

    async def _begin(self, message: dict) -> None:
        self._start = message
        kind = _header(message, b"content-type")
        self._is_stream = kind.startswith(b"text/event-stream")
        self._is_error = message["status"] >= HTTPStatus.BAD_REQUEST and kind.startswith(b"application/json")
        self._is_held = self._is_stream or self._is_error
        if not self._is_held:
            await self._send_start(message)

    async def _collect(self, message: dict) -> None:
        self._held.append(message)
        if message.get("more_body"):
            return
        body, status = b"".join(part.get("body", b"") for part in self._held), self._start["status"]
        failure = self._failure()
        error = failure if failure and failure.status == status else http_errors.read(body, status, self._surface)
        if error is None:  # not an error in vLLM's shape or ours
            return await self._release()
        await self._fail(error)

    async def _event(self, message: dict) -> None:
        if error := self._failure() or http_errors.read_event(message.get("body", b""), self._surface):
            return await self._fail(error)
        self._first = self._first or message.get("body", b"")
        if not self._is_held:
            self._events += 1
            return await self._send(message)
        self._held.append(message)
        if self._turns.begun or not message.get("more_body") or len(self._held) == _MAX_HELD:
            await self._release()

    async def _release(self) -> None:
        self._is_held = False
        await self._send_start(self._start)
        self._events = len(self._held)
        for part in self._held:
            await self._send(part)

    async def _fail(self, error: HttpError) -> None:
        self._ended = True
        if not self._is_held:
            last = self._surface.last_event(error, self._events, self._first)
            return await self._send({"type": "http.response.body", "body": last})
        body = self._surface.body(error)
        kept = [(name, value) for name, value in self._start.get("headers", ()) if name.lower() not in _OF_THE_BODY]
        headers = [*kept, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send_start({**self._start, "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _failure(self) -> HttpError | None:
        """What the frontend noted, as a client is told it."""
        return self._surface.told(HttpError.of(self._turns.failure)) if self._turns.failure else None

    async def _send_start(self, message: dict) -> None:
        if message["status"] == HTTPStatus.TOO_MANY_REQUESTS and not _header(message, b"retry-after"):
            failure = self._turns.failure
            after_s = failure.retry_after_s if isinstance(failure, Overloaded) else 1
            message = {**message, "headers": [*message.get("headers", ()), (b"retry-after", str(math.ceil(after_s)).encode())]}
        await self._send(message)


_OF_THE_BODY = frozenset({b"content-type", b"content-length"})


def _header(message: dict, wanted: bytes) -> bytes:
    return next((value for name, value in message.get("headers", ()) if name.lower() == wanted), b"")
