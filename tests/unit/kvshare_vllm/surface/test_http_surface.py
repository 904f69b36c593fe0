"""vLLM's whole app as it is served, over a turn runner that does what a test tells it. No engine runs."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import re

import httpx
import pytest
import pytest_asyncio
from stub_turn import StubTurn
from told_logprobs import logprobs

from prefillshare.kvshare.caller import ANONYMOUS
from prefillshare.kvshare.config import Base
from prefillshare.kvshare.errors import InvalidInput, Overloaded, Unavailable
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare_vllm.surface.frontend import MOST_ID_CHARS
from prefillshare.router.surfaces.http_auth import OPEN

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

MAX_LEN = 128
ASK = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
BODIES = {CHAT: {"messages": ASK}, COMPLETIONS: {"prompt": "hi"}, RESPONSES: {"input": "hi"}, MESSAGES: {"messages": ASK}}
LIMITS = {CHAT: "max_completion_tokens", COMPLETIONS: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
PROMPTS = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input", MESSAGES: "messages"}
SURFACES = pytest.mark.parametrize("path", BODIES)
FULL = Overloaded("no room", retry_after_s=6.2)


#: A step of a turn: wait until the client has received a part of its response.
SENT = object()


class Surface:
    """`steps`: what a turn does: chunks and errors. `limits`: most tokens that each turn of the last request may generate."""

    def __init__(self):
        self.steps: list = []
        self.limits: list[int] = []
        self.extra_args: list[dict | None] = []
        self._sent = asyncio.Event()

    async def start(self, model: str) -> None:
        from prefillshare.kvshare_vllm.surface.openai_app import build_openai_app

        self.base = Base(model=model, dtype="float32", max_model_len=MAX_LEN)
        self.app, self.frontend = await build_openai_app(self.base, ["planner"], self._turn, lambda *_: None)
        transport = httpx.ASGITransport(self._watched, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://router")

    async def _watched(self, scope, receive, send):
        async def watched(message):
            await send(message)
            if message["type"] == "http.response.body":
                self._sent.set()

        await self.app(scope, receive, watched)

    def _turn(self, call) -> StubTurn:
        return StubTurn(self._chunks(call.sampling))

    async def _chunks(self, sampling):
        self.limits.append(sampling.max_tokens)
        self.extra_args.append(sampling.extra_args)
        for step in self.steps or [TokenChunk([500], finish_reason="length")]:
            if step is SENT:
                await asyncio.wait_for(self._sent.wait(), 10)
            elif isinstance(step, Exception):
                raise step
            else:
                yield step

    async def post(self, path: str, *, steps=(), **body) -> httpx.Response:
        self.steps, self.limits, self.extra_args = list(steps), [], []
        self._sent.clear()
        needed = {"max_tokens": 3} if path == MESSAGES else {}
        return await self.http.post(path, json={"model": "planner", **BODIES.get(path, {}), **needed, **body})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def surface(smollm):
    surface = Surface()
    await surface.start(str(smollm))
    yield surface
    await surface.http.aclose()


def error_of(answer: httpx.Response) -> dict:
    return answer.json()["error"]


# Routes


async def test_every_route_of_vllms_app_is_known_and_those_that_cannot_work_here_are_not_there(surface):
    from prefillshare.kvshare_vllm.surface import openai_app
    from prefillshare.kvshare_vllm.surface.http_routes import ADDED, LEFT_OUT, SERVED

    theirs = openai_app.build_app(openai_app._arguments(surface.base), ("generate",), surface.frontend.model_config)
    assert {route.path for route in theirs.routes} == SERVED | LEFT_OUT.keys()
    assert {route.path for route in surface.app.routes} == SERVED | ADDED
    for path in LEFT_OUT:
        for way in ("GET", "POST"):
            assert (await surface.http.request(way, path, json={})).status_code == 404, path


async def test_it_says_who_it_is(surface):
    from vllm.version import __version__

    ours = importlib.metadata.version("prefillshare")
    said = (await surface.http.get("/openapi.json")).json()["info"]
    assert (said["title"], said["version"]) == ("prefillshare", ours)
    assert "share the KV cache" in said["description"]
    assert (await surface.http.get("/version")).json() == {"version": __version__, "prefillshare": ours}


async def test_the_page_that_describes_it_needs_no_other_host(surface):
    from prefillshare.kvshare_vllm.surface.self_description import SCRIPT, STYLE

    page = await surface.http.get("/docs")
    assert f"<title>prefillshare {importlib.metadata.version('prefillshare')}</title>" in page.text
    assert "http" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none';")
    parts = [f"/{part}" for part in re.findall(r'(?:src|href)="([^"]+)"', page.text) if part != "data:,"]
    assert parts == [STYLE, SCRIPT]
    assert set(parts) <= OPEN
    for part, kind in ((SCRIPT, "javascript"), (STYLE, "css")):
        answer = await surface.http.get(part)
        assert (answer.status_code, kind in answer.headers["content-type"]) == (200, True)
    assert (await surface.http.get("/redoc")).status_code == 404


@pytest.mark.parametrize("path", ["/static/", "/static/../openai_app.py", "/static/%2e%2e/basic.py"])
async def test_no_other_file_is_served_beside_the_page(surface, path):
    assert (await surface.http.get(path)).status_code == 404


async def test_every_route_that_is_served_works(surface):
    assert error_of(await surface.http.get("/v1/nothing"))["code"] == 404
    for path in ("/v1/models", "/health", "/ping", "/version", "/metrics", "/docs", "/openapi.json"):
        assert (await surface.http.get(path)).status_code == 200, path
    for path in BODIES:
        assert (await surface.post(path)).status_code == 200, path
    assert len((await surface.post("/v1/chat/completions/batch", messages=[ASK, ASK])).json()["choices"]) == 2
    assert (await surface.post("/v1/messages/count_tokens", messages=ASK)).json()["input_tokens"] > 0
    tokens = (await surface.post("/tokenize", prompt="hi")).json()["tokens"]
    assert (await surface.post("/detokenize", tokens=tokens)).json()["prompt"] == "hi"


async def test_the_description_of_the_api_asks_no_other_host(surface):
    page = await surface.http.get("/docs")
    assert not re.search(r"https?:|[\"'(]//", page.text), page.text
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', page.text):
        assert (await surface.http.get(f"/{name}")).status_code == 200, name
    assert len(re.findall(r'"static/[^"]+"', page.text)) == 2
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'")
    assert "http" not in policy


# Refusals and failures


@SURFACES
@pytest.mark.parametrize(
    ("error", "status", "hint", "kind"), [(FULL, 429, "7", "rate_limit_error"), (Unavailable("gone"), 503, None, "api_error")]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_turn_is_a_refusal_in_its_clients_shape_with_and_without_a_stream(
    surface, path, error, status, hint, kind, stream
):
    answer = await surface.post(path, steps=[error], stream=stream)
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, hint)
    if path == MESSAGES:
        assert answer.json() == {"type": "error", "error": {"type": kind, "message": str(error)}}
    else:
        assert (error_of(answer)["message"], error_of(answer)["code"]) == (str(error), status)


@SURFACES
async def test_a_request_that_vllm_refuses_has_its_clients_shape(surface, path):
    for body in ({"temperature": "hot"}, {"model": "nobody"}, {"temperature": 9.0}):
        answer = await surface.post(path, **body, stream=True)
        assert answer.status_code == (404 if "model" in body else 400)
        if path == MESSAGES:
            kind = "not_found_error" if "model" in body else "invalid_request_error"
            assert (answer.json()["type"], error_of(answer)["type"]) == ("error", kind)
        else:
            assert error_of(answer)["code"] == answer.status_code


@SURFACES
async def test_a_stream_that_fails_after_its_first_token_ends_with_an_error_event(surface, path):
    answer = await surface.post(path, steps=[TokenChunk([500]), SENT, Unavailable("gone")], stream=True)
    assert answer.status_code == 200
    event = [line for line in answer.text.splitlines() if line.startswith("data: {")][-1]
    last = json.loads(event.removeprefix("data: "))
    assert "gone" in json.dumps(last)
    if path == RESPONSES:
        events = [line for line in answer.text.splitlines() if line.startswith("event: ")]
        assert events[-2:] == ["event: error", "event: response.failed"]
        assert (last["type"], last["sequence_number"]) == ("response.failed", len(events) - 1)
    elif path == MESSAGES:
        assert last == {"type": "error", "error": {"type": "api_error", "message": "gone"}}
    else:
        assert last["error"]["code"] == 503
        assert answer.text.endswith("data: [DONE]\n\n")


@SURFACES
@pytest.mark.parametrize(("stream", "before"), [(False, []), (True, []), (True, [TokenChunk([500]), SENT])])
async def test_an_unforeseen_error_shows_nothing_of_the_inside(surface, path, stream, before):
    answer = await surface.post(path, steps=[*before, RuntimeError("redis://user:secret@10.0.0.1/0")], stream=stream)
    assert answer.status_code == (200 if before else 500)
    assert "secret" not in answer.text
    assert "log says why" in answer.text


async def test_openais_client_raises_its_own_errors_on_refused_streams(surface):
    openai = pytest.importorskip("openai")
    client = openai.AsyncOpenAI(api_key="x", base_url="http://router/v1", max_retries=0, http_client=surface.http)
    surface.steps = [FULL]
    with pytest.raises(openai.RateLimitError, match="no room"):
        await client.chat.completions.create(model="planner", messages=ASK, stream=True)
    with pytest.raises(openai.RateLimitError, match="no room"):
        await client.responses.create(model="planner", input="hi", stream=True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RESPONSES, {"background": True}),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}),
        (CHAT, {"chat_template": "{{ 1 }}"}),
        (COMPLETIONS, {"prompt_embeds": "AAAA"}),
        (COMPLETIONS, {"n": 20_000}),
        (COMPLETIONS, {"prompt": ["a"] * 2_000}),
    ],
)
async def test_no_refusal_advises_how_to_start_vllm(surface, path, body):
    answer = await surface.post(path, **body)
    assert answer.status_code == 400
    assert "VLLM_" not in answer.text
    assert "--" not in answer.text


# Near the model's length


async def test_a_completion_without_a_limit_generates_at_most_sixteen_tokens_and_what_fits(surface):
    token = TokenChunk([500], logprobs=logprobs((500, -0.5), (500, -0.5), (501, -0.9)), finish_reason="length")
    for prompt_tokens, generated in ((100, 16), (112, 16), (113, 15), (127, 1)):
        for body in ({}, {"max_tokens": None}, {"stream": True}):
            answer = await surface.post(COMPLETIONS, prompt=[500] * prompt_tokens, **body)
            assert answer.status_code == 200, answer.text
            assert surface.limits == [generated]
        answer = await surface.post(COMPLETIONS, prompt=[500] * prompt_tokens, use_beam_search=True, steps=[token])
        assert surface.limits == [1] * generated  # a beam takes one turn per token
    answer = await surface.post(COMPLETIONS, prompt=[[500] * 100, [500] * 120])
    assert surface.limits == [16, 8]


@SURFACES
async def test_a_prompt_that_leaves_no_room_is_said_to_be_too_long(surface, path):
    for tokens in (MAX_LEN, MAX_LEN + 1):
        body = await of_length(surface, path, tokens)
        answer = await surface.post(path, **body)
        assert answer.status_code == 400
        error = error_of(answer)
        assert "max_tokens" not in error["message"]
        assert any(words in error["message"] for words in ("too long", "reduce"))
        assert error.get("param", PROMPTS[path]) == PROMPTS[path]
    answer = await surface.post(path, **(await of_length(surface, path, MAX_LEN - 1)) | {LIMITS[path]: 1})
    assert answer.status_code == 200, answer.text
    assert surface.limits[-1] == 1


@SURFACES
async def test_a_limit_that_does_not_fit_is_refused_under_its_own_name(surface, path):
    body = await of_length(surface, path, MAX_LEN - 2)
    answer = await surface.post(path, **body | {LIMITS[path]: 3})
    assert answer.status_code == 400
    error = error_of(answer)
    field = f"{error['param']}: " if "param" in error else ""  # Anthropic's shape has no such key
    assert error["message"].startswith(f"{field}3 tokens do not fit beside the prompt, 2 do")
    assert error.get("param", LIMITS[path]) == LIMITS[path]


async def of_length(surface: Surface, path: str, tokens: int) -> dict:
    """A body whose prompt has `tokens` tokens."""
    if path == COMPLETIONS:
        return {"prompt": [500] * tokens}
    opening = (await surface.post("/tokenize", messages=ASK)).json()["count"]
    messages = [{"role": "user", "content": "hi" + " hi" * (tokens - opening)}]
    assert (await surface.post("/tokenize", messages=messages)).json()["count"] == tokens
    return {"input" if path == RESPONSES else "messages": messages}


async def test_sessions_say_the_same_near_the_models_length(surface, smollm):
    from prefillshare.kvshare.decoders import Decoder
    from prefillshare.kvshare_vllm.sampling import make_sampling_params
    from prefillshare.router.ahead.response_kv import ResponseKV
    from prefillshare.router.sessions import MemorySessions
    from prefillshare.router.sessions.turns import Turns

    base, decoders = surface.base, {"planner": Decoder("planner", "pool", "prefillshare", "planner", "lora")}
    turns = Turns(base, decoders, surface.frontend, MemorySessions(10, 100), ResponseKV())

    async def turn(session_tokens: int, max_tokens: int | None = None) -> int:
        """Take a turn; returns the limit with which it ran."""
        surface.steps, surface.limits = [], []
        session = await turns.create("", ("token_ids", [500] * session_tokens))
        more = ("token_ids", [500])
        sampling = make_sampling_params(max_tokens=max_tokens)
        async for _ in turns.take(session.session_id, "planner", more, None, sampling, "r", ANONYMOUS):
            pass
        return surface.limits[-1]

    assert await turn(100) == MAX_LEN - 101
    assert await turn(MAX_LEN - 2) == 1
    for tokens, max_tokens, field in ((MAX_LEN - 1, None, "input"), (MAX_LEN - 1, 1, "input"), (MAX_LEN, None, "input"),
                                      (MAX_LEN - 2, 2, "sampling.max_tokens")):  # fmt: skip
        with pytest.raises(InvalidInput) as refused:
            await turn(tokens, max_tokens)
        assert refused.value.field == field
        assert ("tokens leave no room" in refused.value.message) == (field == "input")


# Log-probabilities of the prompt


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {"prompt_logprobs": 0}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": 2}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 0}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 0, "echo": True, "logprobs": 0}, "prompt_logprobs"),
        (COMPLETIONS, {"echo": True, "logprobs": 0}, "echo"),
        (COMPLETIONS, {"echo": True, "logprobs": 3}, "echo"),
    ],
)
async def test_asking_for_the_prompts_log_probabilities_is_refused_under_the_field_that_asks(surface, path, body, field):
    answer = await surface.post(path, **body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, field)
    assert "skip_reading_prefix_cache" not in answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"echo": True}),
        (CHAT, {"echo": True, "stream": True}),
        (CHAT, {"prompt_logprobs": None}),
        (COMPLETIONS, {"echo": True}),
        (COMPLETIONS, {"echo": True, "logprobs": None}),
        (COMPLETIONS, {"echo": False}),
    ],
)
async def test_what_asks_for_none_is_let_through(surface, path, body):
    answer = await surface.post(path, **body)
    assert answer.status_code == 200, answer.text
    if path == COMPLETIONS and body["echo"]:
        assert answer.json()["choices"][0]["text"].startswith("hi")


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"logprobs": True}), (COMPLETIONS, {"logprobs": 0})])
async def test_zero_log_probabilities_of_generated_tokens_are_the_tokens_own(surface, path, body):
    chunk = TokenChunk([500], logprobs=logprobs((500, -0.5)), finish_reason="length")
    answer = await surface.post(path, steps=[chunk], **body)
    told = answer.json()["choices"][0]["logprobs"]
    assert [told["content"][0]["logprob"]] == [-0.5] if path == CHAT else told["token_logprobs"] == [-0.5]


# Limits of one request

ALTERNATIVES = {"oneOf": [{"type": "object", "properties": {f"p{n}": {"type": "string"}}} for n in range(900)]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {"structured_outputs": {"regex": "^(([a-z]{1,50}){1,50}){1,50}$"}}, "structured_outputs.regex"),
        (CHAT, {"structured_outputs": {"regex": "((a{0,100}){0,100}){0,100}"}}, "structured_outputs.regex"),
        (COMPLETIONS, {"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ALTERNATIVES}}},
            "response_format",
        ),
        (COMPLETIONS, {"prompt": "a " * 100_000}, "prompt"),
        (COMPLETIONS, {"prompt": [[1]] * 2000}, "prompt"),
        (CHAT, {"messages": [*ASK] * 2000}, "messages"),
    ],
)
async def test_what_would_hold_up_everybody_is_refused_and_no_turn_sees_it(surface, path, body, field, stream):
    answer = await surface.post(path, **body, stream=stream)
    assert (answer.status_code, surface.limits) == (400, []), answer.text
    assert error_of(answer)["param"] == field, answer.text


async def test_a_request_that_allows_only_what_it_forbids_is_refused(surface):
    (only,) = surface.frontend.renderer.tokenizer.encode("I", add_special_tokens=False)
    answer = await surface.post(CHAT, allowed_token_ids=[only], bad_words=["I"])
    assert (answer.status_code, surface.limits) == (400, [])
    assert error_of(answer)["param"] == "allowed_token_ids"


async def test_a_format_that_is_cheap_reaches_its_turn_as_engines_get_it(surface):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert (await surface.post(CHAT, response_format=form)).status_code == 200
    assert len(surface.limits) == 1


WRONG = {"type": "dict"}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": WRONG}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "form", "field"),
    [
        (CHAT, {"response_format": AS_JSON}, "response_format"),
        (CHAT, {"structured_outputs": {"json": WRONG}}, "structured_outputs.json"),
        (COMPLETIONS, {"response_format": AS_JSON}, "response_format"),
        (COMPLETIONS, {"structured_outputs": {"json": WRONG}}, "structured_outputs.json"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": WRONG}}}, "text.format"),
        (RESPONSES, {"structured_outputs": {"json": WRONG}}, "structured_outputs.json"),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": WRONG}}}, "output_config.format"),
    ],
)
async def test_a_schema_that_cannot_be_is_told_of_under_the_name_of_the_field_that_held_it(surface, path, form, field, stream):
    answer = await surface.post(path, **form, stream=stream)
    assert (answer.status_code, surface.limits) == (400, [])
    assert error_of(answer)["message"].startswith(f"{field}: "), answer.text


async def test_a_format_that_is_none_is_told_of_by_its_field_for_a_batch_too(surface):
    answer = await surface.post("/v1/chat/completions/batch", messages=[ASK], response_format={"type": "sonnet"})
    assert (answer.status_code, "response_format" in error_of(answer)["param"]) == (400, True)
    assert "pydantic" not in answer.text


async def test_what_a_response_may_leave_null_it_may_leave_null(surface):
    answer = await surface.post(RESPONSES, background=None, truncation=None)
    assert (answer.status_code, answer.json().get("background"), answer.json().get("truncation")) == (200, False, "disabled")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_tokens": 10**6}, "max_tokens=1000000 cannot be greater"),
        ({"stop_sequences": [""]}, "stop_sequences cannot contain an empty string"),
        ({"stop_sequences": ["x" * 20_000]}, "stop_sequences: 20000 characters"),
    ],
)
async def test_a_message_is_refused_in_the_words_of_anthropics_api(surface, wrong, said):
    answer = await surface.post(MESSAGES, **wrong)
    assert (answer.status_code, error_of(answer)["message"].startswith(said)) == (400, True), answer.text


# What is asked for


@SURFACES
@pytest.mark.parametrize("stream", [False, True])
async def test_fields_that_nobody_reads_are_named_in_the_answer(surface, path, stream):
    answer = await surface.post(path, stream=stream, quux=1, **{"x y": 2})
    assert (answer.status_code, answer.headers["x-prefillshare-ignored"]) == (200, "quux, x y")


@SURFACES
async def test_a_format_under_its_old_name_is_refused_on_every_surface(surface, path):
    answer = await surface.post(path, guided_json={"type": "object"})
    assert (answer.status_code, "response_format" in error_of(answer)["message"]) == (400, True)


# What is logged


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
@pytest.mark.parametrize("name", ["x" * MOST_ID_CHARS, "two\nlines"])
async def test_a_request_is_named_by_so_many_printable_characters(surface, path, name):
    answer = await surface.post(path, request_id=name)
    assert (answer.status_code, answer.json()["error"]["param"], surface.limits) == (400, "request_id", [])
    assert len(answer.text) < 2 * MOST_ID_CHARS + 200
    assert (await surface.post(path, request_id="named by its client")).status_code == 200


async def test_a_header_that_names_a_request_is_bounded_too(surface):
    long = {"x-request-id": "x" * MOST_ID_CHARS}
    answer = await surface.http.post(CHAT, json={"model": "planner", "messages": ASK}, headers=long)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "request_id")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_no_client_drives_the_kv_connector(surface, path):
    given = {"remote_engine_id": "e", "remote_block_ids": [[1]], "do_remote_prefill": True}
    await surface.post(path, kv_transfer_params=given, vllm_xargs={"kv_transfer_params": "x"})
    assert surface.extra_args == [None]


SECRET_WORDS = "marzipan quince"


@pytest.mark.parametrize("stream", [False, True])
@SURFACES
async def test_what_is_asked_and_answered_stands_in_no_log(surface, path, stream, caplog):
    """Not even at the most talkative level, and where the turn fails."""
    ask = [{"role": "user", "content": SECRET_WORDS}] if path in (CHAT, MESSAGES) else SECRET_WORDS
    said = surface.frontend.renderer.tokenizer.encode(SECRET_WORDS)
    ends = ([TokenChunk(said, finish_reason="length")], [TokenChunk(said), RuntimeError("it broke")], [FULL])
    with caplog.at_level(logging.DEBUG):
        for steps in ends:
            await surface.post(path, steps=steps, stream=stream, **{PROMPTS[path]: ask})
        await surface.post(path, temperature="hot", **{PROMPTS[path]: ask})
    assert "it broke" in caplog.text
    assert not [word for word in SECRET_WORDS.split() if word in caplog.text]
    assert str(said)[1:-1] not in caplog.text


@SURFACES
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_leave_no_traceback_in_the_log_and_failures_do(surface, path, stream):
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger("vllm").addHandler(handler)
    try:
        schema = {"type": "json_schema", "name": "x", "schema": {"type": "dict"}}
        formats = {CHAT: {"response_format": {**schema, "json_schema": schema}}, RESPONSES: {"text": {"format": schema}}}
        formats |= {COMPLETIONS: formats[CHAT], MESSAGES: {"output_config": {"format": schema}}}
        for wrong in ({LIMITS[path]: 10**6}, formats[path]):
            assert (await surface.post(path, stream=stream, **wrong)).status_code == 400
        assert (await surface.post(path, stream=stream, steps=[FULL])).status_code == 429
        assert [record.getMessage() for record in logged if record.exc_info] == []
        if path == MESSAGES:
            assert (await surface.post(path, stream=stream, steps=[Unavailable("gone")])).status_code == 503
            assert [record for record in logged if record.exc_info]
    finally:
        logging.getLogger("vllm").removeHandler(handler)
