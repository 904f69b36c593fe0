"""Tenants through both surfaces as they are served (R7): vLLM's whole app and gRPC, over a turn runner that records what
reached it. No engine runs; test_rules.py tests that engines keep different salts apart."""

from __future__ import annotations

import asyncio
from functools import partial

import httpx
import pytest
import pytest_asyncio
from ports import free_port
from prometheus_client import CollectorRegistry
from stub_turn import StubTurn

from prefillshare.client import Client
from prefillshare.kvshare.caller import cache_salt
from prefillshare.kvshare.config import Base
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import InvalidInput, NotFound, OverLimit, PermissionDenied, Unauthenticated
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.accounts.limits import MemoryLimits
from prefillshare.router.admission.grant import Demand
from prefillshare.router.tenants import KeysFile, Tenants

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

KEY, OTHER, FEW = "psk-first-tenants-key", "psk-second-tenants-key", "psk-key-of-the-tenant-with-few-turns"
FILE = {
    "tenants": {
        "research": {"keys": [KEY], "may_share": ["handbook"], "priority": 4},
        "support": {"keys": [OTHER]},
        "few": {"keys": [FEW], "turns_per_minute": 1, "tokens_per_minute": 6000},
    }
}
TENANTS = Tenants(KeysFile.model_validate(FILE).tenants)
ASK = [{"role": "user", "content": "hi"}]


class Router:
    """A router without engines. `turns`: (tenant, domain, priority, salt) of each turn since the list was last read."""

    def __init__(self):
        self._turns: list[tuple] = []
        self.forget_limits()

    def forget_limits(self) -> None:
        self._limits = MemoryLimits(Metrics(CollectorRegistry()))

    @property
    def turns(self) -> list[tuple]:
        seen, self._turns = self._turns, []
        return seen

    def run_turn(self, call) -> StubTurn:
        caller = call.caller
        self._turns.append((caller.tenant, caller.cache_domain, caller.priority, cache_salt(caller.cache_domain, call.salt)))
        return StubTurn(self._chunks(call))

    async def _chunks(self, call):
        if share := self._tenants.shares().get(call.caller.tenant):
            await self._limits.take(Demand("pool", len(call.prompt), tenant=share), 3)
        yield TokenChunk([100, 101])
        await asyncio.sleep(0)
        yield TokenChunk([102], finish_reason="length")

    def admit(self, decoder, turns, logprobs=None):
        Decoder("planner", "pool", "prefillshare", "planner", "lora", max_logprobs=5).check_logprobs(logprobs)

    async def start(self, model: str, tenants: Tenants):
        from prefillshare.kvshare_vllm.surface.openai_app import build_openai_app
        from prefillshare.router.ahead.response_kv import ResponseKV
        from prefillshare.router.sessions import MemorySessions
        from prefillshare.router.sessions.turns import Turns
        from prefillshare.router.surfaces.grpc_api import GrpcServer, Servicer
        from prefillshare.router.surfaces.http_auth import ApiKeys, shows_all
        from prefillshare.router.telemetry.node_metrics import NodeMetrics

        self._tenants, base = tenants, Base(model=model, dtype="float32", max_model_len=512)
        keys = partial(ApiKeys, tenants=tenants)
        metrics = partial(NodeMetrics, agent=None, replicas=tuple, shows_all=partial(shows_all, tenants))
        app, frontend = await build_openai_app(
            base, ["planner"], self.run_turn, self.admit, middleware=[keys, metrics]
        )
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")
        decoders = {"planner": Decoder("planner", "pool", "prefillshare", "planner", "lora")}
        self.sessions = MemorySessions(10, 100)
        turns = Turns(base, decoders, frontend, self.sessions, ResponseKV())
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.grpc = GrpcServer(Servicer(turns, None), "127.0.0.1", port, tenants)
        await self.grpc.start()

    async def post(self, path: str, body: dict, **headers) -> httpx.Response:
        limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        return await self.http.post(path, json={"model": "planner", limit: 3, **body}, headers=headers)


#: Every way to generate.
WAYS = [
    ("/v1/chat/completions", {"messages": ASK}),
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", {"messages": ASK}),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def router(smollm):
    router = Router()
    await router.start(str(smollm), TENANTS)
    yield router
    await router.http.aclose()
    await router.grpc.stop(0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), WAYS)
async def test_every_way_to_generate_runs_as_the_keys_tenant_under_its_salt(router, path, body, stream):
    answer = await router.post(path, body | {"stream": stream}, authorization=f"Bearer {KEY}")
    assert answer.status_code == 200, answer.text
    assert router.turns == [("research", "research", 4, cache_salt("research"))]
    answer = await router.post(path, body | {"stream": stream}, **{"x-api-key": OTHER})
    assert answer.status_code == 200, answer.text
    assert router.turns == [("support", "support", 0, cache_salt("support"))]
    assert (await router.post(path, body | {"stream": stream})).status_code == 401
    assert router.turns == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": ASK, "n": 2}),
        ("/v1/completions", {"prompt": "hi", "n": 2}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
async def test_a_request_goes_behind_its_tenants_others_and_never_before_them(router, path, body):
    turns = body.get("n", 1)
    for asked, priority in ((7, 11), (99, 100)):
        answer = await router.post(path, body | {"priority": asked}, authorization=f"Bearer {KEY}")
        assert answer.status_code == 200, answer.text
        assert router.turns == [("research", "research", priority, cache_salt("research"))] * turns
    for asked in (-1, 101):
        answer = await router.post(path, body | {"priority": asked}, authorization=f"Bearer {KEY}")
        assert (answer.status_code, router.turns) == (400, [])
        assert f"priority: {asked} is out of range" in answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), WAYS)
async def test_answers_and_refusals_tell_how_the_tenant_stands_against_its_limits(router, path, body, stream):
    router.forget_limits()
    answers = [await router.post(path, body | {"stream": stream}, authorization=f"Bearer {FEW}") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "1"
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert 5900 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 6000
        assert ("anthropic-ratelimit-tokens-limit" in answer.headers) == (path == "/v1/messages")
    assert "tenants.few.turns_per_minute: 1 turns a minute have been taken" in answers[1].json()["error"]["message"]
    assert 58 <= int(answers[1].headers["retry-after"]) <= 60
    free = await router.post(path, body | {"stream": stream}, authorization=f"Bearer {KEY}")
    assert not any("ratelimit" in name for name in free.headers)
    assert len(router.turns) == 3


async def test_over_grpc_the_client_raises_what_limit_it_was_and_when_to_try_again(router):
    router.forget_limits()

    def turns():
        with Client(router.address, api_key=FEW, retries=None) as client:
            session = client.create_session(text="hello")
            session.turn("planner", text="x", max_tokens=3)
            with pytest.raises(OverLimit, match=r"^tenants\.few\.turns_per_minute: 1 turns a minute") as caught:
                session.turn("planner", text="x", max_tokens=3)
            return caught.value

    error = await asyncio.to_thread(turns)
    assert error.field == "tenants.few.turns_per_minute"
    assert 50 < error.retry_after_s <= 60
    assert len(router.turns) == 2


async def test_where_the_body_has_no_priority_a_header_says_it(router):
    answer = await router.post("/v1/messages", {"messages": ASK}, **{"x-api-key": KEY, "x-prefillshare-priority": "7"})
    assert answer.status_code == 200, answer.text
    answer = await router.post("/v1/messages", {"messages": ASK}, **{"x-api-key": KEY, "x-prefillshare-priority": "-7"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "x-prefillshare-priority: -7 is out of range" in answer.text
    assert [priority for _, _, priority, _ in router.turns] == [11]


async def test_a_turn_over_grpc_goes_behind_its_tenants_others(router):
    def turns():
        with Client(router.address, api_key=KEY, retries=None) as client:
            session = client.create_session(text="hello")
            session.turn("planner", text="x", max_tokens=3, priority=7)
            with pytest.raises(InvalidInput, match="priority: -1 is out of range"):
                session.turn("planner", text="x", max_tokens=3, priority=-1)

    await asyncio.to_thread(turns)
    assert [priority for _, _, priority, _ in router.turns] == [11]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": ASK, "logprobs": True, "top_logprobs": 6}),
        ("/v1/completions", {"prompt": "hi", "logprobs": 6}),
        ("/v1/completions", {"prompt": "hi", "logprobs": 21}),
    ],
)
async def test_more_logprobs_than_the_pool_gives_are_refused_before_anything_runs(router, path, body, stream):
    answer = await router.post(path, body | {"stream": stream}, authorization=f"Bearer {KEY}")
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "logprobs"
    assert "ask for at most 5, or raise max_logprobs" in answer.text
    assert router.turns == []


async def test_turns_over_grpc_name_the_sampling_field_that_is_refused(router):
    def turns():
        with Client(router.address, api_key=KEY, retries=None) as client:
            session = client.create_session(text="hello")
            with pytest.raises(InvalidInput, match=r"^sampling\.logprobs: 6 is more than the 5 likeliest"):
                session.turn("planner", text="x", max_tokens=3, logprobs=6)
            with pytest.raises(InvalidInput, match=r"^sampling\.min_tokens: 4 is more than the 3 tokens"):
                session.turn("planner", text="x", max_tokens=3, min_tokens=4)

    await asyncio.to_thread(turns)
    assert router.turns == []


async def test_a_clients_own_salt_is_folded_in_for_each_of_several_answers(router):
    body = {"messages": ASK, "n": 3, "cache_salt": cache_salt("research")}
    assert (await router.post("/v1/chat/completions", body, **{"x-api-key": OTHER})).status_code == 200
    assert router.turns == [("support", "support", 0, cache_salt("support", cache_salt("research")))] * 3


async def test_the_header_puts_a_request_into_a_shared_domain(router):
    shared = {"x-prefillshare-cache-domain": "handbook"}
    answer = await router.post("/v1/completions", {"prompt": ["a", "b"]}, authorization=f"Bearer {KEY}", **shared)
    assert answer.status_code == 200
    assert router.turns == [("research", "handbook", 4, cache_salt("handbook"))] * 2
    assert (await router.post("/v1/completions", {"prompt": "a"}, **{"x-api-key": OTHER}, **shared)).status_code == 403
    assert router.turns == []


async def test_everything_the_app_serves_takes_a_key_but_what_is_known_to_be_open(router):
    paths = (await router.http.get("/openapi.json")).json()["paths"]
    calls = [(way, path) for path, ways in paths.items() for way in ways]
    is_open = {path for way, path in calls if (await router.http.request(way, path)).status_code != 401}
    assert len(paths) > 10
    assert is_open == {"/health", "/ping", "/version", "/metrics"}
    for way, path in (("POST", "/metrics"), ("GET", "/metrics/x"), ("GET", "/metricsx")):  # vLLM's app shows all there
        answer = await router.http.request(way, path, headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code in (404, 405)


async def test_sessions_stay_in_the_domain_they_were_made_in_and_so_do_their_forks(router):
    def turns():
        with Client(router.address, api_key=KEY, retries=None) as client:
            own, shared = client.create_session(text="hello"), client.create_session(text="hello", cache_domain="handbook")
            for session in (own, shared, shared.fork(), own.fork()):
                session.turn("planner", text="x", max_tokens=3)
            with pytest.raises(PermissionDenied, match="cache domain 'support'"):
                client.create_session(cache_domain="support")
        with Client(router.address, retries=None) as client, pytest.raises(Unauthenticated):
            client.decoders()

    await asyncio.to_thread(turns)
    assert [domain for _, domain, _, _ in router.turns] == ["research", "handbook", "handbook", "research"]


async def test_tenants_do_not_see_each_others_sessions_whatever_their_names(router):
    def turns():
        with Client(router.address, api_key=KEY) as one, Client(router.address, api_key=OTHER) as two:
            one.create_session("same", text="hello")
            for use in (lambda s: s.get(), lambda s: s.fork(), lambda s: s.turn("planner", text="x"), lambda s: s.delete()):
                with pytest.raises(NotFound):
                    use(two.session("same"))
            two.create_session("same", text="hello")
            for client in (one, two):
                client.session("same").turn("planner", text="x", max_tokens=3)

    await asyncio.to_thread(turns)
    assert [(tenant, domain) for tenant, domain, _, _ in router.turns] == [("research", "research"), ("support", "support")]


async def test_a_session_in_a_domain_its_tenant_may_no_longer_use_takes_no_turn(router):
    made = await router.sessions.create("old", [1, 2], tenant="support", cache_domain="handbook")

    def turn():
        with Client(router.address, api_key=OTHER, retries=None) as client:
            client.session(made.session_id).turn("planner", text="x", max_tokens=3)

    with pytest.raises(PermissionDenied, match="cache domain 'handbook'"):
        await asyncio.to_thread(turn)
    assert router.turns == []


async def test_without_tenants_keys_stay_unsalted(smollm):
    router = Router()
    await router.start(str(smollm), Tenants())
    try:
        assert (await router.post("/v1/completions", {"prompt": "a"})).status_code == 200
        assert router.turns == [("", "", 0, None)]
        assert (await router.post("/v1/completions", {"prompt": "a", "cache_salt": "mine"})).status_code == 200
        assert router.turns == [("", "", 0, cache_salt("", "mine"))]
    finally:
        await router.http.aclose()
        await router.grpc.stop(0)
