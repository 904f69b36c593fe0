"""Bounds on what an HTTP body holds, checked before vLLM's request models see it; then what it asks for (asked_fields.py).

Validation runs on the router's event loop, and what it costs depends on how many things a body lists, not on its bytes: a
megabyte of one-token prompts takes seconds. So lists are counted first, on plain JSON, where a megabyte takes milliseconds.

Seam: vllm/entrypoints/openai/responses/protocol.py (ResponsesRequest.input)
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import FailFast
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.errors import InvalidInput, Overloaded
from prefillshare.kvshare_vllm.surface.asked_fields import AskedFields, header_of
from prefillshare.kvshare_vllm.surface.http_errors import HttpError, refuse

#: Most messages, prompts, tools or texts in one list; parts of one message; entries of all lists of a request together.
MOST_ENTRIES, MOST_PARTS, MOST_TOGETHER = 1024, 128, 8192
#: Seconds within which each piece of a body has to come, and all of it.
PIECE_S, BODY_S = 20.0, 300.0
#: Shorter bodies cannot list too much.
CHECKED_FROM_BYTES = 2048
#: Without such an escape, JSON has whole characters only.
_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")


class _FailFast(FailFast):
    __hash__ = object.__hash__  # a union's members are put into a set


def stop_at_the_first_wrong_item() -> None:
    """An item of /v1/responses that fits none of its two dozen kinds costs hundreds of errors; one such item is enough."""
    field = ResponsesRequest.model_fields["input"]
    text, items = get_args(field.annotation)
    if getattr(items, "__metadata__", None):
        return
    field.annotation = text | Annotated[items, _FailFast()]
    ResponsesRequest.model_rebuild(force=True)


class RequestShape:
    """ASGI middleware, inside router/surfaces/http_limits.py, which bounds the bytes that are held here. `most_numbers`: most
    numbers (token ids) in one list. `fields`: what may be asked for, by path. `most_bodies`: of one tenant that may be on their
    way at once: a request takes a place of the router before anything but its tenant is known of it."""

    def __init__(self, app, most_numbers: int, fields: AskedFields, most_bodies: int = 256):
        self._app, self._most_numbers, self._fields, self._most_bodies = app, most_numbers, fields, most_bodies
        #: Tenant -> its requests whose bodies are on their way.
        self._bodies: Counter[str] = Counter()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        try:
            with self._coming():
                async with asyncio.timeout(BODY_S):
                    body = await _whole(receive)
        except TimeoutError:
            text = f"the body comes too slowly: {PIECE_S:g} s for a piece, {BODY_S:g} s for all (fix: send it faster)"
            late = HttpError(408, text, "Request Timeout")
            return await refuse(late, scope, receive, send, headers={"connection": "close"})
        except Overloaded as error:
            return await refuse(HttpError.of(error), scope, receive, send, headers={"connection": "close"})
        if body is None:
            return None
        given = False
        if not _is_utf8(body):
            return await _refuse("the body is not JSON in UTF-8 (fix: send it so)", None, scope, receive, send)
        values, ignored = _parsed(body), []
        if field := _half_a_character(body, values):
            text = f"{field}: it contains half of a surrogate pair, which is no character (fix: send whole characters)"
            return await _refuse(text, field, scope, receive, send)
        if len(body) >= CHECKED_FROM_BYTES and (problem := _too_much(values, self._most_numbers)):
            return await _refuse(problem.text, problem.field, scope, receive, send)
        try:
            ignored = self._fields.ignored(scope["path"], values) if isinstance(values, dict) else []
        except InvalidInput as error:
            return await _refuse(str(error), error.field, scope, receive, send)

        async def naming_ignored(message):
            if message["type"] == "http.response.start" and ignored:
                message = {**message, "headers": [*message.get("headers", ()), header_of(ignored)]}
            await send(message)

        async def again():
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self._app(scope, again, naming_ignored)

    @contextmanager
    def _coming(self) -> Iterator[None]:
        """A request whose body is on its way. Raises Overloaded."""
        tenant = current_caller.get().tenant
        if self._bodies[tenant] >= self._most_bodies:
            raise Overloaded(
                f"{self._most_bodies} requests of this tenant have not sent their bodies yet", fix="send what was begun first"
            )
        self._bodies[tenant] += 1
        try:
            yield
        finally:
            self._bodies[tenant] -= 1
            if not self._bodies[tenant]:
                del self._bodies[tenant]


async def _whole(receive) -> bytes | None:
    """The body; None if the client has gone."""
    pieces, more = [], True
    while more:
        async with asyncio.timeout(PIECE_S):
            message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


async def _refuse(text: str, field: str | None, scope, receive, send) -> None:
    await refuse(HttpError(400, text, "BadRequestError", field), scope, receive, send)


@dataclass(frozen=True)
class _Problem:
    field: str
    text: str


def too_much(body: bytes, most_numbers: int) -> _Problem | None:
    """The list of the body that is too long; None if there is none, or if the body is not JSON, which vLLM reports."""
    return _too_much(_parsed(body), most_numbers)


def _parsed(body: bytes) -> Any:
    """None for what is no JSON."""
    collects = gc.isenabled()
    gc.disable()  # so many new objects would have it scan all others, too
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
    finally:
        if collects:
            gc.enable()


def _is_utf8(body: bytes) -> bool:
    """Python reads JSON in other encodings, too, and halves of surrogate pairs that stand for themselves."""
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return json.detect_encoding(body).startswith("utf-8")


def _half_a_character(body: bytes, values: Any) -> str | None:
    """The field of a text that JSON can express, and UTF-8 cannot."""
    if not _HALVES.search(body):
        return None
    left = [("", values)]
    while left:
        path, value = left.pop()
        if isinstance(value, str) and not _is_whole(value):
            return path or "the body"
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in inner:
            if isinstance(key, str) and not _is_whole(key):
                return path or "the body"
            left.append((f"{path}.{key}" if path else str(key), one))
    return None


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_much(values, most_numbers: int) -> _Problem | None:
    together, left = 0, [("", "", values)]
    while left:
        path, key, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{path}.{key}" if path else key, key, v) for key, v in value.items() if isinstance(v, list | dict)]
        elif isinstance(value, list):
            entries = [v for v in value if type(v) not in (int, float)]
            together += len(entries)
            if len(value) - len(entries) > most_numbers:
                return _Problem(path, f"{path} lists {len(value)} numbers; at most {most_numbers} are taken (fix: send fewer)")
            if len(entries) > (most := MOST_PARTS if key == "content" else MOST_ENTRIES):
                return _Problem(path, f"{path} lists {len(entries)} entries; at most {most} are taken (fix: send fewer)")
            left += [(path, "", v) for v in entries if isinstance(v, list | dict)]
    if together > MOST_TOGETHER:
        text = f"the request lists {together} entries altogether; at most {MOST_TOGETHER} are taken (fix: send fewer)"
        return _Problem("", text)
    return None
