"""Errors as the clients of each HTTP surface expect them: in OpenAI's shape, in Anthropic's, and as the last event of a stream.

Seam: vllm/entrypoints/serve/engine/protocol.py (ErrorResponse), vllm/entrypoints/anthropic/protocol.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import ClassVar

from starlette.responses import Response

from prefillshare.kvshare.errors import UNFORESEEN, Conflict, InvalidInput, NotFound, PermissionDenied, PrefillShareError
from prefillshare.kvshare_vllm.vllm_refusals import for_clients

#: https://docs.claude.com/en/api/errors
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
#: Names the session that a call goes on from.
SESSION_HEADER = "x-prefillshare-session"
#: Names that errors have for what clients of every surface send under another name.
_SENT = {"session_id": SESSION_HEADER}
#: The field that a text begins with.
_SPOKEN = re.compile(r"`?([a-z_]+)`?")
#: Anthropic's field for conversations that the server holds. Its clients look for this detail of the refusal, and send whole
#: histories from then on.
THREAD = "thread"
_ANTHROPIC_DETAILS = {THREAD: {"error_code": "thread_unsupported_request", "unsupported": [THREAD]}}
#: OpenAI's codes of a response's failure, by status; else a server's error.
_FAILURES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
#: vLLM's names for a prompt's length; a client is told the field that holds the prompt instead.
_LENGTHS = frozenset({"input_tokens", "input_text"})
#: Errors whose field is one of the request.
_ABOUT_FIELDS = InvalidInput | NotFound | Conflict | PermissionDenied
#: vLLM's names of errors, where they differ from the status's phrase.
_TYPES = {400: "BadRequestError", 404: "NotFoundError"}


@dataclass(frozen=True)
class HttpError:
    """`type`: vLLM's, for OpenAI's shape; Anthropic's type follows from the status."""

    status: int
    message: str
    type: str
    param: str | None = None

    @classmethod
    def of(cls, error: PrefillShareError) -> HttpError:
        kind = _TYPES.get(error.http_status) or HTTPStatus(error.http_status).phrase
        return cls(error.http_status, str(error), kind, error.field if isinstance(error, _ABOUT_FIELDS) else None)


class OpenAI:
    """The shape for chat, completions and all other routes of vLLM's. `fields`: names that errors have for what this surface's
    clients send under another name."""

    prompt_field: str | None = None
    fields: ClassVar[Mapping[str, str]] = _SENT

    def told(self, error: HttpError) -> HttpError:
        """The error under the name of the field that was sent, which vLLM's text may begin with."""
        spoken = _SPOKEN.match(error.message)
        named = error.param or (spoken[1] if spoken else "")
        if (sent := self.fields.get(named)) is None:
            return error
        if spoken and spoken[1] == named:
            return replace(error, param=sent, message=sent + error.message[spoken.end() :])
        return replace(error, param=sent, message=f"{sent}: {error.message}")

    def body(self, error: HttpError) -> bytes:
        fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.status}
        return json.dumps({"error": fields}).encode()

    def last_event(self, error: HttpError, number: int, first: bytes) -> bytes:
        """What ends a stream of which `number` events have been sent. `first`: the first of them."""
        return b"data: " + self.body(error) + b"\n\ndata: [DONE]\n\n"


class Chat(OpenAI):
    prompt_field = "messages"


class Completions(OpenAI):
    prompt_field = "prompt"


class Responses(OpenAI):
    prompt_field = "input"

    def last_event(self, error: HttpError, number: int, first: bytes) -> bytes:
        """An error, and that the response has failed: clients look for one or the other."""
        fields = {"code": error.type, "message": error.message, "param": error.param, "sequence_number": number}
        told = b"event: error\ndata: " + json.dumps({"type": "error", **fields}).encode() + b"\n\n"
        begun = _data(first).get("response")
        if not isinstance(begun, dict):
            return told
        why = {"code": _FAILURES.get(error.status, "server_error"), "message": error.message}
        failed = {"response": begun | {"status": "failed", "error": why, "store": False}, "sequence_number": number + 1}
        return told + b"event: response.failed\ndata: " + json.dumps({"type": "response.failed", **failed}).encode() + b"\n\n"


class Anthropic(OpenAI):
    prompt_field = "messages"
    fields: ClassVar = _SENT | {
        "stop": "stop_sequences",
        "max_completion_tokens": "max_tokens",
        "response_format": "output_config.format",
        "reasoning_effort": "output_config.effort",
        "thinking_token_budget": "thinking.budget_tokens",
    }

    def body(self, error: HttpError) -> bytes:
        by_kind = "api_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        fields = {"type": _ANTHROPIC_TYPES.get(error.status, by_kind), "message": error.message}
        if details := _ANTHROPIC_DETAILS.get(error.param):
            fields["details"] = details
        return json.dumps({"type": "error", "error": fields}).encode()

    def last_event(self, error: HttpError, number: int, first: bytes) -> bytes:
        return b"event: error\ndata: " + self.body(error) + b"\n\n"


_SURFACES = (
    ("/v1/messages", Anthropic()),
    ("/v1/responses", Responses()),
    ("/v1/chat/completions", Chat()),
    ("/v1/completions", Completions()),
)
_OTHER = OpenAI()


def surface_of(path: str) -> OpenAI:
    return next((surface for start, surface in _SURFACES if path == start or path.startswith(f"{start}/")), _OTHER)


def response_of(error: HttpError, headers: Mapping[str, str] | None = None) -> Response:
    """In the shape of vLLM's errors; HttpRefusals, on the way out, gives it the shape of its surface."""
    return Response(_OTHER.body(error), error.status, headers, media_type="application/json")


async def refuse(
    error: HttpError, scope, receive, send, *, headers: Mapping[str, str] | None = None, close_code: int = 1008
) -> None:
    """Answer in the place of an app. `close_code`: with which a web socket is closed."""
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": close_code, "reason": error.message})
    await response_of(error, headers)(scope, receive, send)


def read(body: bytes, status: int | None, surface: OpenAI) -> HttpError | None:
    """The error in a body of vLLM's or FastAPI's, as a client is told it; None if there is none.

    `status`: the response's; None for an event, which may contain the status itself.
    """
    try:
        said = json.loads(body)
    except ValueError:
        return None
    fields = said.get("error", {"message": said.get("detail")}) if isinstance(said, dict) else None
    if not isinstance(fields, dict) or not isinstance(fields.get("message"), str):
        return None
    if status is None:
        status = fields["code"] if isinstance(fields.get("code"), int) else HTTPStatus.INTERNAL_SERVER_ERROR
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return unforeseen()
    param, message = fields.get("param"), for_clients(fields["message"])
    param = surface.prompt_field if param in _LENGTHS else param
    if param and str(param) not in message:  # clients show the text
        message = f"{param}: {message}"
    kind = str(fields.get("type") or _TYPES.get(status) or HTTPStatus(status).phrase)
    return surface.told(HttpError(status, message, kind, param))


def read_event(chunk: bytes, surface: OpenAI) -> HttpError | None:
    """The error in a chunk of a stream; None if there is none."""
    if not chunk.startswith((b'data: {"error"', b"event: error\n")):
        return None
    _, _, data = chunk.partition(b"data: ")
    return read(data.split(b"\n", 1)[0], None, surface) or unforeseen()


def _data(event: bytes) -> dict:
    """What an event says; nothing if it is no JSON object."""
    try:
        said = json.loads(event.partition(b"data: ")[2].split(b"\n", 1)[0])
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def unforeseen() -> HttpError:
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return HttpError(status.value, UNFORESEEN, status.phrase)
