"""A router's /metrics has the engines' metrics of its machine behind its own, and is bounded by what is deployed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_asgi_app

from prefillshare.kvshare.metric_sizes import Series
from prefillshare.kvshare.metrics import DEFINITIONS, Metrics
from prefillshare.kvshare.metrics_text import families, samples, total
from prefillshare.kvshare.other_metrics import ENGINE_METRICS, Kind
from prefillshare.router.surfaces.http_auth import shows_all
from prefillshare.router.telemetry.node_metrics import NodeMetrics
from prefillshare.router.tenants import KeysFile, Tenants, digest

#: What Ray adds to every series.
RAYS = (
    'Component="core_worker",NodeAddress="127.0.0.1",SessionName="session_2026-11-29_14-15-56_839572_10606",Version="2.60.0",'
    'WorkerId="125e13dcecdba7f2a985597815404ffb33b3d2e44f4548f1a30c8f3c",otel_scope_name="ray._private.telemetry",'
    'otel_scope_schema_url="",otel_scope_version=""'
)


def engine(replica: str, pool: str = "agents", value: float = 3.0) -> str:
    """What an agent tells of an engine that exports all that vLLM has, and of Ray."""
    labels = f'{RAYS},ReplicaId="{replica}",engine="0",model_name="{pool}"'
    lines = [f"ray_vllm_request_success_total{{{labels},finished_reason=\"stop\"}} 1.0", f"ray_tasks{{{RAYS}}} 9.0"]
    lines += [f'ray_vllm_e2e_request_latency_seconds_bucket{{{labels},le="{le}"}} 1.0' for le in (1, 5, "+Inf")]
    for metric in ENGINE_METRICS.values():
        if metric.kind is Kind.HISTOGRAM:
            lines += [f'ray_{metric.name}_bucket{{{labels},le="{le}"}} {value}' for le in (*range(1, 15), "+Inf")]
            lines += [f"ray_{metric.name}_{part}{{{labels}}} {value}" for part in ("sum", "count")]
        else:
            lines.append(f"ray_{metric.name}{{{labels}}} {value}")
    return "".join(f"{line}\n" for line in lines)


@contextmanager
def agent(answer: str, status: int = 200):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_): ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()


@pytest.fixture
def registry():
    registry = CollectorRegistry()
    Metrics(registry)["turns_total"].labels("planner", "ok").inc(4)
    return registry


def scraping(
    registry: CollectorRegistry, agent_url: str | None, replicas: Iterable[str] = (), tenants: Tenants = Tenants()  # noqa: B008
) -> httpx.AsyncClient:
    """Around an app that shows the whole registry at every path, as vLLM's does."""
    app = NodeMetrics(make_asgi_app(registry), agent_url, lambda: set(replicas), partial(shows_all, tenants), registry)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")


async def told(registry: CollectorRegistry, agent_url: str | None, replicas: Iterable[str] = ("a1", "b2")) -> str:
    async with scraping(registry, agent_url, replicas) as client:
        answer = (await client.get("/metrics")).raise_for_status()
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return answer.text


def series(text: str) -> int:
    return sum(not line.startswith("#") for line in text.splitlines())


async def test_engines_metrics_stand_behind_the_routers_under_their_own_names(registry):
    with agent(engine("a1") + engine("b2", "prefill", 5)) as url:
        text = await told(registry, url)
    assert total(text, "prefillshare_turns_total") == 4
    assert samples(text, "vllm_num_requests_running")[0].labels == {"model_name": "agents", "ReplicaId": "a1", "engine": "0"}
    assert total(text, "vllm_prompt_tokens_total", model_name="prefill") == 5
    assert total(text, "vllm_nixl_bytes_transferred_sum") == 8
    assert len(samples(text, "vllm_nixl_xfer_time_seconds_bucket")) == 30
    kinds = {family.name: family.type for family in families(text)}
    assert kinds["vllm_prompt_tokens"] == "counter"
    assert kinds["vllm_nixl_xfer_time_seconds"] == "histogram"
    assert "ray_" not in text


async def test_series_that_nobody_can_use_are_left_out(registry):
    Histogram("http_request_duration_highr_seconds", "by every bucket", registry=registry).observe(1)
    Counter("python_gc_collections", "of the garbage collector", registry=registry).inc()
    with agent(engine("a1")) as url:
        text = await told(registry, url)
    for name in ("vllm_e2e", "vllm_request_success", "vllm_nixl_bytes_transferred_bucket", "http_request_duration", "python_gc",
                 "_created", "WorkerId", "otel_scope", "SessionName"):  # fmt: skip
        assert name not in text, name


async def test_replicas_that_are_gone_are_left_out_although_the_agent_goes_on_telling_of_them(registry):
    with agent("".join(map(engine, ("a1", "dead", "b2")))) as url:
        text = await told(registry, url)
    assert {one.labels["ReplicaId"] for one in samples(text, "vllm_num_requests_running")} == {"a1", "b2"}
    assert "dead" not in text


async def test_a_client_makes_no_series_by_the_methods_it_uses(registry):
    requests = Counter("http_requests_total", "requests", ("handler", "method", "status"), registry=registry)
    for number in range(100):
        requests.labels("none", f"METHOD{number}", "4xx").inc()
    text = await told(registry, None)
    assert [(one.labels, one.value) for one in samples(text, "http_requests_total")] == [
        ({"handler": "none", "status": "4xx"}, 100)
    ]


@pytest.mark.parametrize(("decoders", "replicas"), [(1, 1), (3, 2), (40, 16)])
async def test_its_size_is_bounded_by_what_is_deployed(decoders, replicas):
    """With names as long as they may be; docs/metrics.md tells the bound."""
    registry = CollectorRegistry()
    names, pools = [f"{number:063}" for number in range(decoders)], [f"pool-{number:057}" for number in range(2)]
    metrics = Metrics(registry)
    metrics.expect(names, pools, names)
    for decoder in names:
        for kind in ("prompt", "cached", "computed", "generated"):
            metrics["tenant_tokens_total"].labels("harbour", decoder, kind).inc()
        metrics["tenant_turns_total"].labels("harbour", decoder).inc()
        metrics["tenant_kv_byte_seconds_total"].labels("harbour", decoder).inc()
    metrics["kept_tokens"].labels("harbour").set(1)
    ids = [f"{number:08}" for number in range(replicas)]
    with agent("".join(engine(replica) for replica in [*ids, *(f"gone-{number}" for number in range(50))])) as url:
        text = await told(registry, url, ids)
    most = Series.most()
    of_decoders = (most.decoder + most.own_layers + most.tenant_decoder) * decoders
    assert series(text) <= of_decoders + most.pool * 2 + most.tenant + most.engine * replicas + most.router
    assert series(text) >= 0.8 * of_decoders
    assert len(text) <= 170 * series(text)


async def test_the_demo_is_scraped_in_less_than_64_kib():
    registry = CollectorRegistry()
    Metrics(registry).expect(["base", "arithmetic", "tools"], ["agents", "prefill"])
    with agent(engine("a1") + engine("b2", "prefill")) as url:
        text = await told(registry, url)
    assert 20_000 < len(text) < 64 * 1024


async def test_an_agent_that_does_not_answer_takes_nothing_from_the_routers_own(registry, caplog):
    with agent("gone", 500) as url:
        text = await told(registry, url)
    assert (total(text, "prefillshare_turns_total"), "vllm" in text) == (4, False)
    assert "tells nothing" in caplog.text


async def test_who_asks_while_the_agent_is_being_asked_gets_that_answer(registry, monkeypatch):
    asked, ask = 0, httpx.AsyncClient.get

    async def slowly(client, url, **how):
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.1)
        return await ask(client, url, **how)

    with agent(engine("a1")) as url:
        monkeypatch.setattr("prefillshare.router.telemetry.node_metrics.httpx.AsyncClient.get", slowly)
        app = NodeMetrics(None, url, lambda: {"a1"}, lambda headers: True, registry)
        told = await asyncio.gather(*(app._of_engines() for _ in range(20)))
        assert (len(set(told)), asked) == (1, 1)
        assert b"vllm_num_requests_running" in told[0]
        await app._of_engines()
        assert asked == 2


async def test_without_an_agent_there_are_the_routers_own_only(registry):
    assert total(await told(registry, None), "prefillshare_turns_total") == 4


async def test_an_agents_nonsense_takes_nothing_from_the_routers_own(registry, caplog):
    with agent("ray_vllm_num_requests_running{a=\n") as url:
        text = await told(registry, url)
    assert total(text, "prefillshare_turns_total") == 4
    assert "tells nothing" in caplog.text


TENANT, OPERATOR, WRONG = "psk-first-tenants-key", "psk-for-prometheus-only", "psk-nobodys-key-at-all"
TENANTS = Tenants(KeysFile.model_validate({"tenants": {"harbour": {"keys": [TENANT]}}}).tenants, [digest(OPERATOR)])


@pytest.fixture
def of_tenants():
    """All metrics that have a tenant's name among their labels, and one that has not."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics["turns_total"].labels("planner", "ok").inc(4)
    for metric in DEFINITIONS.values():
        if "tenant" in metric.labels:
            child = metrics[metric.name.removeprefix("prefillshare_")].labels(*("harbour" for _ in metric.labels))
            child.set(1) if metric.kind is Gauge else child.inc()
    return registry


def shown(text: str) -> set[str]:
    """Families of which there are series that name a tenant."""
    return {family.name for family in families(text) if any("tenant" in one.labels for one in family.samples)}


OF_TENANTS = {metric.family for metric in DEFINITIONS.values() if "tenant" in metric.labels}


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
async def test_with_keys_only_an_operator_sees_who_the_tenants_are(of_tenants, path):
    assert {"prefillshare_tenant_turns", "prefillshare_tenant_tokens", "prefillshare_kept_tokens"} <= OF_TENANTS
    async with scraping(of_tenants, None, tenants=TENANTS) as client:
        for headers in ({}, {"authorization": f"Bearer {TENANT}"}, {"x-api-key": TENANT}, {"authorization": "Basic x"}):
            answer = await client.get(path, headers=headers)
            assert (answer.status_code, shown(answer.text)) == (200, set())
            assert "harbour" not in answer.text
            assert not any(f"{name}_" in answer.text or f"{name} " in answer.text for name in OF_TENANTS)
            assert total(answer.text, "prefillshare_turns_total") == 4
        for headers in ({"authorization": f"Bearer {OPERATOR}"}, {"x-api-key": OPERATOR}):
            answer = await client.get(path, headers=headers)
            assert (answer.status_code, shown(answer.text)) == (200, OF_TENANTS)
            assert total(answer.text, "prefillshare_turns_total") == 4


async def test_a_prometheus_with_a_wrong_key_is_told_so(of_tenants):
    async with scraping(of_tenants, None, tenants=TENANTS) as client:
        answer = await client.get("/metrics", headers={"authorization": f"Bearer {WRONG}"})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert WRONG not in answer.text
    assert "harbour" not in answer.text


async def test_without_keys_everybody_sees_everything_whatever_is_sent(of_tenants):
    async with scraping(of_tenants, None) as client:
        for headers in ({}, {"authorization": f"Bearer {WRONG}"}):
            assert shown((await client.get("/metrics", headers=headers)).text) == OF_TENANTS


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS", "NONSENSE"])
@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/metrics/x", "/metricsx", "/metrics?name[]=prefillshare_sessions"])
async def test_there_is_no_way_around_the_key(of_tenants, method, path):
    async with scraping(of_tenants, None, tenants=TENANTS) as client:
        answer = await client.request(method, path, headers={"authorization": f"Bearer {TENANT}"})
    found = "x" not in path.partition("?")[0]
    assert answer.status_code == (404 if not found else 200 if method in ("GET", "HEAD") else 405)
    assert "harbour" not in answer.text
