"""What operators see of a running system, with a real Prometheus and a trace collector: metrics, dashboards, rules, traces and
logs. The models are tiny; several modes are served, so that every panel has something to show."""

from __future__ import annotations

import json
import math
import re
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from conftest import System, ids, system, wait_until
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from otlp_collector import Collector
from ports import free_port
from prometheus_server import Prometheus

from benchmarks.shared.load import quantile
from prefillshare.apply import apply
from prefillshare.kvshare.metric_sizes import Series
from prefillshare.kvshare.metrics import DEFINITIONS
from prefillshare.kvshare.metrics_text import families, total
from prefillshare.kvshare.other_metrics import ENGINE_METRICS, ROUTER_METRICS
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

pytestmark = pytest.mark.engine

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus/rules.yaml"
BLOCK = 32
TURNS = 24


@pytest.fixture(scope="module")
def collector():
    port = free_port()
    with Collector(port) as it:
        it.port = port
        yield it


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm, collector):
    folder = tmp_path_factory.mktemp("observability")
    base = make_base("llama", folder / "base", smollm)
    made = {name: str(path) for name, path in make_seeded_adapters(base, folder / "adapters", names=("a", "b", "c")).items()}
    small = {"kv_cache_gib": 0.05, "cpu_cores": "1", "max_lora_rank": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with system(
            {
                "base": {"model": str(base), "dtype": "float32", "max_model_len": 512, "block_size": BLOCK},
                "prefill": {"kv_cache_gib": 0.05, "cpu_cores": "0"},
                "decode": [
                    {"pool": "agents", "local_prefill": "never", "adapters": {"a": made["a"], "b": made["b"]}, **small},
                    {
                        "pool": "drift",
                        "sharing": "droidspeak",
                        "adapters": {"c": made["c"]},
                        "own_layers": {"c": "1-2"},
                        "quality_floor": 1.0,
                        "serve_base": False,
                        "autoscale": {"max_replicas": 2, "target_calls": 2, "upscale_delay_s": 1, "downscale_delay_s": 2},
                        **small,
                    },
                ],
                "router": {"canary_share": 1.0},
                "tracing": {"otlp_endpoint": f"http://127.0.0.1:{collector.port}"},
                "logs": {"format": "json"},
            }
        ) as it:
            yield it


# Traces ---------------------------------------------------------------------------------------------------------------


def continued(running: System, how: str, sampled: bool) -> tuple[str, str]:
    """Take a turn whose client is in the middle of a trace. Returns (the trace, the client's span)."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    prompt = ids(100, salt=secrets.randbelow(1000))
    if how == "http":
        body = {"model": "a", "prompt": prompt, "max_tokens": 4, "ignore_eos": True}
        parent = {"traceparent": f"00-{trace_id}-{span_id}-0{int(sampled)}"}
        httpx.post(f"{running.http_url}/completions", json=body, headers=parent, timeout=60).raise_for_status()
        return trace_id, span_id
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    here = NonRecordingSpan(SpanContext(int(trace_id, 16), int(span_id, 16), False, flags))
    token = attach(trace.set_span_in_context(here))
    try:
        session = running.client.create_session(token_ids=prompt)
        session.turn("a", token_ids=[5], max_tokens=4, ignore_eos=True)
    finally:
        detach(token)
    return trace_id, span_id


@pytest.mark.parametrize("how", ["grpc", "http"])
def test_a_turn_is_one_trace_from_its_client_to_the_engines(running, collector, how):
    trace_id, client_span = continued(running, how, sampled=True)
    expected = {"turn", "queue", "prefill", "decode", "kv load", "llm_request"}
    wait_until(lambda: expected <= {s.name for s in collector.of(trace_id)} and len(collector.of(trace_id)) >= 7)
    spans = collector.of(trace_id)
    assert len(spans) == 7  # both engines' own are called llm_request
    by_name = {span.name: span for span in spans if span.name != "llm_request"}
    turn, prefill, decode = (by_name[name] for name in ("turn", "prefill", "decode"))
    assert turn.parent == client_span
    assert {by_name[name].parent for name in ("queue", "prefill", "decode")} == {turn.id}
    assert by_name["kv load"].parent == decode.id
    engines = {span.parent: span for span in spans if span.name == "llm_request"}
    assert engines[prefill.id].service == "prefillshare-prefill"
    assert engines[decode.id].service == "prefillshare-agents"
    assert turn.service == "prefillshare-router"
    for span in spans:
        assert turn.began - 0.01 <= span.began <= span.ended <= turn.ended + 0.01
    assert prefill.ended <= decode.began
    assert turn.attributes["gen_ai.request.model"] == "a"
    assert turn.attributes["gen_ai.usage.output_tokens"] == 4
    assert by_name["kv load"].attributes["prefillshare.kv_bytes"] > 0


def test_what_its_client_does_not_sample_is_not_traced(running, collector):
    trace_id, _ = continued(running, "grpc", sampled=False)
    after, _ = continued(running, "grpc", sampled=True)
    wait_until(lambda: len(collector.of(after)) >= 7)
    assert collector.of(trace_id) == []


def test_what_no_turn_asked_for_is_not_traced(running, collector):
    """Engines start no traces of their own for probes and eager prefills."""
    turns = {span.trace for span in collector.spans if span.name == "turn"}
    assert {span.trace for span in collector.spans if span.name == "llm_request"} <= turns


# Metrics --------------------------------------------------------------------------------------------------------------


class Session:
    """What a client measured of turns taken one after the other."""

    def __init__(self, running: System):
        self.latencies_s, self.cached, self.computed = [], 0, 0
        self.began = time.monotonic()
        context = running.client.create_session(token_ids=ids(150, salt=secrets.randbelow(1000)))
        context.keep(ttl_s=300)
        for number in range(TURNS):
            asked = time.monotonic()
            usage = context.turn("abc"[number % 3], token_ids=ids(4, salt=number), max_tokens=3, ignore_eos=True).usage
            self.latencies_s.append(time.monotonic() - asked)
            self.cached += usage.cached_tokens
            self.computed += usage.computed_tokens
            time.sleep(0.2)


    @property
    def since_s(self) -> float:
        """Seconds from just before the session began until now."""
        return time.monotonic() - self.began + 2


@pytest.fixture(scope="module")
def watched(running, tmp_path_factory):
    """(a Prometheus that has seen a session, the session)."""
    targets = [f"127.0.0.1:{running.deployment.router.http_port}"]
    with Prometheus(tmp_path_factory.mktemp("prometheus"), free_port(), targets, RULES) as prometheus:
        wait_until(lambda: prometheus.query("count_over_time(prefillshare_turns_total[1m]) >= 2"))
        session = Session(running)
        # The engines' own metrics come through Ray's agent, some seconds later.
        reads = 'count_over_time(vllm_nixl_bytes_transferred_count{model_name="agents"}[1m])'
        wait_until(lambda: prometheus.query(f"{reads} >= 5"), 90)
        last = prometheus.value("sum(prefillshare_turn_seconds_count)")
        wait_until(lambda: prometheus.value("sum(prefillshare_turn_seconds_count offset 6s)") >= last)
        yield prometheus, session


def panels() -> list[tuple[str, str]]:
    found = []
    for file in sorted((DEPLOY / "grafana").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            found += [(f"{file.stem}: {panel['title']}", target["expr"]) for target in panel.get("targets", ())]
    return found


def shown(query: str, window_s: float = 60) -> str:
    """The query with values for Grafana's variables."""
    query = query.replace("$__rate_interval", f"{window_s:.0f}s")
    for variable in ("decoder", "pool", "tenant"):
        query = query.replace(f"${variable}", ".*")
    return query.replace("$ttft", "1.0").replace("$gap", "0.1")


def test_every_panel_has_data(watched):
    prometheus, _ = watched

    def empty() -> list[str]:
        return [f"{title}: {query}" for title, query in panels() if not prometheus.query(shown(query))]

    with suppress(AssertionError):  # Ray's agent exports some of the engines' metrics later than others
        wait_until(lambda: not empty(), 30, 1)
    assert empty() == []
    assert len(panels()) > 50


def test_every_rule_is_evaluated_and_what_it_looks_at_is_there(watched):
    prometheus, _ = watched
    rules = prometheus.rules()
    assert [rule["name"] for rule in rules if rule["health"] != "ok" or rule.get("lastError")] == []
    written = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    assert len(rules) == len(written)
    for rule in written:
        if "record" in rule:
            assert prometheus.query(rule["record"]), rule["record"]
        looked_at = re.findall(r"prefillshare[_:][\w:]+(?:\{[^}]*\})?", rule["expr"])
        assert looked_at or rule["expr"].startswith("vector(")  # an objective
        for selector in looked_at:
            if "=~" not in selector:  # no turn has failed in that way here
                assert prometheus.query(selector), f"{rule}: {selector}"


def test_the_hit_ratio_is_the_one_that_the_client_saw(watched):
    prometheus, session = watched
    (query,) = (q for title, q in panels() if title.endswith("Prefix-cache hit ratio") and "by (" not in q)
    seen = prometheus.value(shown(query, session.since_s))
    own = session.cached / (session.cached + session.computed)
    assert own > 0.5
    assert seen == pytest.approx(own, abs=0.03)


def test_the_p95_is_the_one_that_the_client_saw(watched):
    """As near as the histogram's buckets can tell."""
    prometheus, session = watched
    window = f"{session.since_s:.0f}s"
    seen = prometheus.value(f"histogram_quantile(0.95, sum by (le) (rate(prefillshare_turn_seconds_bucket[{window}])))")
    own, bounds = quantile(session.latencies_s, 0.95), (0.0, *DEFINITIONS["prefillshare_turn_seconds"].buckets)
    below = max(number for number, bound in enumerate(bounds) if bound <= own)
    assert bounds[max(0, below - 1)] <= seen <= bounds[below + 2]


def test_sharing_is_seen_to_save(watched):
    """Three decoders share one context: each finds the KV that was computed for the others."""
    prometheus, session = watched
    saved = {r["metric"]["decoder"]: float(r["value"][1]) for r in prometheus.query("prefillshare_prefill_tokens_saved_total")}
    assert set("abc") <= saved.keys()
    assert 2 * 128 <= sum(saved.values()) <= session.cached
    assert prometheus.value("sum(prefillshare_cross_model_hits_total)") >= 3


def test_engines_are_named_by_pool_and_replica(running, watched):
    prometheus, _ = watched
    found = prometheus.query("vllm_num_requests_running")
    assert {r["metric"]["model_name"] for r in found} == {"prefill", "agents", "drift"}
    assert {r["metric"]["ReplicaId"] for r in found} == {id for pool in running.info().values() for id in pool}


@pytest.mark.usefixtures("watched")
def test_what_is_scraped_is_described_and_bounded(running):
    text = httpx.get(f"http://127.0.0.1:{running.deployment.router.http_port}/metrics", timeout=30).text
    found = {family.name for family in families(text)}
    described = {metric.family for metric in (*DEFINITIONS.values(), *ENGINE_METRICS.values(), *ROUTER_METRICS.values())}
    assert found <= described
    assert {"vllm_num_requests_running", "http_requests", "process_open_fds"} <= found
    most, series = Series.most(), sum(not line.startswith("#") for line in text.splitlines())
    of_decoders = 4 * (most.decoder + most.tenant_decoder) + most.own_layers + 1
    assert series <= of_decoders + 3 * most.pool + 4 * most.engine + most.tenant + most.router
    assert len(text) < 100 * 1024


@pytest.mark.usefixtures("watched")
def test_rays_agent_tells_of_engines_only_what_is_described():
    text = httpx.get(_agent(), timeout=30).text
    of_engines = {family.name for family in families(text) if family.name.startswith("ray_vllm_")}
    assert of_engines
    assert of_engines <= {f"ray_{metric.family}" for metric in ENGINE_METRICS.values()}


def _agent() -> str:
    (node,) = ray.nodes()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


@pytest.mark.usefixtures("watched")
def test_rays_agent_has_the_routers_metrics_too(running):
    agent = _agent()
    own = httpx.get(f"http://127.0.0.1:{running.deployment.router.http_port}/metrics", timeout=30).text
    for what in ("completion_tokens_total", "turn_seconds_count", "inter_token_seconds_count"):
        name = f"prefillshare_{what}"
        counted = total(own, name)
        assert counted > 0
        wait_until(lambda: total(httpx.get(agent, timeout=30).text, f"ray_{name}") >= counted, 60, 1)  # noqa: B023
    assert math.isclose(total(httpx.get(agent, timeout=30).text, "ray_prefillshare_replicas"), 3)


# Logs -----------------------------------------------------------------------------------------------------------------


def logged() -> list[dict]:
    """What the processes of this Ray session have written as JSON."""
    found = []
    for file in Path(ray._private.worker._global_node.get_logs_dir_path()).glob("worker-*"):
        for line in file.read_text(errors="replace").splitlines():
            with suppress(ValueError):  # lines of other writers, or a line that is being written
                found += [one for one in [json.loads(line)] if isinstance(one, dict) and "levelname" in one]
    return found


def asked(running: System) -> str:
    body = {"model": "b", "prompt": ids(40, salt=7), "max_tokens": 2, "ignore_eos": True}
    answer = httpx.post(f"{running.http_url}/completions", json=body, timeout=60)
    return answer.raise_for_status().json()["id"]


def test_logs_are_objects_that_name_the_request(running):
    request = asked(running)
    (line,) = wait_until(lambda: [one for one in logged() if request in one.get("request_id", "")])
    said = line["levelname"], line["name"], line["outcome"], line["decoder"]
    assert said == ("INFO", "prefillshare.router.turn.turn", "ok", "b")
    assert line["completion_tokens"] == 2
    assert {one["name"].split(".")[0] for one in logged()} >= {"vllm", "prefillshare"}


def test_the_level_changes_while_it_runs(running):
    """The level changes in the router, in replicas, and in the engines' own processes."""
    quiet, loud = (running.deployment.model_copy(update={"logs": running.deployment.logs.model_copy(update={"level": level})})
                   for level in ("error", "debug"))  # fmt: skip
    before = running.info()
    apply(quiet)
    unheard = asked(running)
    assert not [one for one in logged() if one["levelname"] == "DEBUG"]
    apply(loud)
    heard = asked(running)
    wait_until(lambda: [one for one in logged() if heard in one.get("request_id", "")])
    wait_until(lambda: [one for one in logged() if one["levelname"] == "DEBUG" and "EngineCore" in one["processName"]])
    assert not [one for one in logged() if unheard in one.get("request_id", "")]
    apply(running.deployment)
    assert running.info().keys() == before.keys()
    assert {pool: set(found) for pool, found in running.info().items()} == {pool: set(found) for pool, found in before.items()}


# Scale ----------------------------------------------------------------------------------------------------------------


def test_replicas_follow_the_load(running):
    """Their number goes up while many turns run, and down again afterwards; no turn fails meanwhile."""
    stop = threading.Event()

    def keep_asking(salt: int) -> int:
        taken = 0
        while not stop.is_set():
            session = running.client.create_session(token_ids=ids(60, salt=200 + salt))
            taken += len(session.turn("c", token_ids=[taken], max_tokens=200, ignore_eos=True).token_ids) == 200
        return taken

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking, salt) for salt in range(3)]
        try:
            wait_until(lambda: sum(r["usable"] for r in running.info()["drift"].values()) == 2, 120, 1)
        finally:
            stop.set()
    assert all(future.result() for future in asking)
    wait_until(lambda: len(running.info()["drift"]) == 1, 120, 1)
    assert running.client.create_session(token_ids=ids(60)).turn("c", token_ids=[1], max_tokens=2, ignore_eos=True).token_ids
