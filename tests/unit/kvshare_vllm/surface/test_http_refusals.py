"""A refused stream is a refusal, not a 200 with an error in it, on every surface; a failed one ends with its clients' error."""

import asyncio
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from prefillshare.kvshare.errors import UNFORESEEN, Internal, InvalidInput, Overloaded, Unavailable
from prefillshare.kvshare_vllm.surface.http_refusals import HttpRefusals, note_begun, note_failure

FULL = Overloaded("no room", retry_after_s=6.2)
OPENAI, RESPONSES, ANTHROPIC = "/v1/chat/completions", "/v1/responses", "/v1/messages"
#: What a surface's clients find in the body of a refusal.
SHAPES = {
    OPENAI: {"error": {"message": "no room", "type": "Too Many Requests", "param": None, "code": 429}},
    RESPONSES: {"error": {"message": "no room", "type": "Too Many Requests", "param": None, "code": 429}},
    ANTHROPIC: {"type": "error", "error": {"type": "rate_limit_error", "message": "no room"}},
}
#: What ends a stream of which one event was sent.
LAST_EVENTS = {
    OPENAI: f"data: {json.dumps(SHAPES[OPENAI])}\n\ndata: [DONE]\n\n",
    RESPONSES: "event: error\ndata: " + json.dumps(
        {"type": "error", "code": "Too Many Requests", "message": "no room", "param": None, "sequence_number": 1}
    ) + "\n\n",
    ANTHROPIC: f"event: error\ndata: {json.dumps(SHAPES[ANTHROPIC])}\n\n",
}  # fmt: skip
SURFACES = pytest.mark.parametrize("path", SHAPES)


async def ask(path: str, *steps, stream=True) -> httpx.Response:
    """What a client gets from an app that does these steps: a text is sent, an error of ours noted, another one raised."""

    async def in_a_task(step):  # as vLLM runs its turns
        note_begun() if step is None else note_failure(step)

    async def body():
        for step in steps:
            if isinstance(step, str):
                yield step
            elif isinstance(step, RuntimeError):
                raise step
            else:
                await asyncio.create_task(in_a_task(step))

    async def answer(request):
        if stream:
            return StreamingResponse(body(), media_type="text/event-stream")
        (step,) = steps
        note_failure(step)
        return JSONResponse({"error": {"message": "as vLLM says it", "code": step.http_status}}, step.http_status)

    app = HttpRefusals(Starlette(routes=[Route(path, answer, methods=["POST"])]))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return await client.post(path)


BEGUN = None


@SURFACES
@pytest.mark.parametrize("before", [(), ("event: response.created\ndata: {}\n\n", "event: response.in_progress\ndata: {}\n\n")])
async def test_a_stream_that_is_refused_has_the_refusals_status_body_and_hint(path, before):
    answer = await ask(path, *before, FULL, "what vLLM makes of it", "data: [DONE]\n\n")
    assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (429, SHAPES[path], "7")
    assert answer.headers["content-type"] == "application/json"


@SURFACES
async def test_a_stream_whose_app_breaks_off_when_refused_has_the_refusals_status_too(path):
    answer = await ask(path, "event: response.created\ndata: {}\n\n", FULL, RuntimeError("broken off"))
    assert (answer.status_code, answer.json()) == (429, SHAPES[path])


@SURFACES
@pytest.mark.parametrize("after", ["what vLLM makes of it", RuntimeError("broken off")])
async def test_a_stream_that_fails_later_keeps_its_status_and_ends_with_its_clients_error(path, after):
    answer = await ask(path, BEGUN, "data: {}\n\n", FULL, after)
    assert (answer.status_code, answer.text) == (200, "data: {}\n\n" + LAST_EVENTS[path])
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize(
    ("error", "code"),
    [(FULL, "rate_limit_exceeded"), (Unavailable("gone"), "server_error"), (InvalidInput("no"), "invalid_prompt")],
)
async def test_a_response_that_fails_later_ends_as_failed_and_not_stored_behind_the_error(error, code):
    begun = {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress", "store": True}}
    created = f"event: response.created\ndata: {json.dumps(begun)}\n\n"
    answer = await ask(RESPONSES, BEGUN, created, "data: {}\n\n", error, "what vLLM makes of it")
    told, failed = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")][-2:]
    assert (told["type"], told["message"], told["sequence_number"]) == ("error", str(error), 2)
    why = {"code": code, "message": str(error)}
    response = {"id": "resp_1", "status": "failed", "store": False, "error": why}
    assert failed == {"type": "response.failed", "sequence_number": 3, "response": response}


@SURFACES
async def test_the_first_tokens_end_the_waiting(path):
    answer = await ask(path, "data: 1\n\n", BEGUN, "data: 2\n\n", "data: 3\n\n")
    assert (answer.status_code, answer.text) == (200, "data: 1\n\ndata: 2\n\ndata: 3\n\n")


async def test_no_more_than_a_few_events_are_held():
    answer = await ask(OPENAI, *["data: {}\n\n"] * 20, FULL, "data: {}\n\n")
    assert answer.status_code == 200
    assert answer.text == "data: {}\n\n" * 20 + LAST_EVENTS[OPENAI]


@SURFACES
@pytest.mark.parametrize(
    ("error", "status", "hint", "kind"),
    [
        (FULL, 429, "7", "rate_limit_error"),
        (InvalidInput("too long", field="messages"), 400, None, "invalid_request_error"),
        (Unavailable("no replica"), 503, None, "api_error"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_every_refusal_says_the_same_with_and_without_a_stream(path, error, status, hint, kind, stream):
    answer = await ask(path, error, *(["said by vLLM"] if stream else []), stream=stream)
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, hint)
    said = answer.json()["error"]
    assert said["message"] == str(error)
    if path == ANTHROPIC:
        assert (answer.json()["type"], said["type"]) == ("error", kind)
    else:
        assert (said["code"], said["param"]) == (status, error.field)


@SURFACES
async def test_what_was_not_foreseen_shows_nothing_of_the_inside(path):
    secret = "redis://user:secret@10.0.0.1/0"
    anthropics = json.dumps({"type": "error", "error": {"type": "internal_error", "message": secret}})
    openais = json.dumps({"error": {"message": secret, "type": "InternalServerError", "param": None, "code": 500}})
    for steps in ([f"event: error\ndata: {anthropics}\n\n"], [f"data: {openais}\n\n"], ["data: 1\n\n", RuntimeError(secret)]):
        for begun in ([], [BEGUN, "data: 0\n\n"]):
            answer = await ask(path, *begun, *steps)
            assert secret not in answer.text
            assert UNFORESEEN in answer.text
            assert answer.status_code == (200 if begun else 500)


async def test_an_internal_error_of_ours_keeps_its_text():
    assert (await ask(OPENAI, Internal("the turn ended"), stream=False)).json()["error"]["message"] == "the turn ended"


@pytest.mark.parametrize("stream", [False, True])
async def test_anthropics_clients_are_told_of_the_fields_that_they_sent(stream):
    failure = InvalidInput("17 texts", field="stop", fix="give 16")
    error = (await ask(ANTHROPIC, failure, stream=stream)).json()["error"]
    assert error == {"type": "invalid_request_error", "message": "stop_sequences: 17 texts (fix: give 16)"}
    assert (await ask(OPENAI, failure, stream=stream)).json()["error"]["param"] == "stop"


@SURFACES
async def test_a_session_that_cannot_be_had_is_told_of_under_the_headers_name(path):
    told = (await ask(path, InvalidInput("it is damaged", field="session_id"), stream=False)).json()["error"]["message"]
    assert told == "x-prefillshare-session: it is damaged"
