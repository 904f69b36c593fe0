"""A router's /metrics has the engines' metrics of its machine behind its own."""

from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx
from prometheus_client import CollectorRegistry, Counter, make_asgi_app

from prefillshare.kvshare.metrics_text import samples, total
from prefillshare.router.telemetry.node_metrics import NodeMetrics

AGENT = b"""\
# HELP ray_vllm_num_requests_running running
# TYPE ray_vllm_num_requests_running gauge
ray_vllm_num_requests_running{model_name="agents"} 3.0
# TYPE ray_vllm_prompt_tokens_total gauge
ray_vllm_prompt_tokens_total{model_name="agents"} 5.0
# TYPE ray_vllm_e2e_seconds histogram
ray_vllm_e2e_seconds_bucket{le="+Inf"} 2.0
ray_vllm_e2e_seconds_count 2.0
ray_vllm_e2e_seconds_sum 0.5
# TYPE ray_node_mem gauge
ray_node_mem 9.0
"""


@contextmanager
def agent(answer: bytes, status: int = 200):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_): ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()


async def told(agent_url: str | None) -> str:
    registry = CollectorRegistry()
    Counter("prefillshare_turns", "turns", registry=registry).inc(4)
    transport = httpx.ASGITransport(NodeMetrics(make_asgi_app(registry), agent_url))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        return (await client.get("/metrics")).raise_for_status().text


async def test_engines_metrics_stand_behind_the_routers_under_their_own_names():
    with agent(AGENT) as url:
        text = await told(url)
    assert total(text, "prefillshare_turns_total") == 4
    assert total(text, "vllm_num_requests_running", model_name="agents") == 3
    assert total(text, "vllm_prompt_tokens_total") == 5
    assert total(text, "vllm_e2e_seconds_sum") == 0.5
    assert not samples(text, "ray_node_mem")
    assert "ray_" not in text


async def test_an_agent_that_does_not_answer_takes_nothing_from_the_routers_own(caplog):
    with agent(b"gone", 500) as url:
        text = await told(url)
    assert (total(text, "prefillshare_turns_total"), "vllm" in text) == (4, False)
    assert "tells nothing" in caplog.text


async def test_without_an_agent_there_are_the_routers_own_only():
    assert total(await told(None), "prefillshare_turns_total") == 4


async def test_an_agents_nonsense_takes_nothing_from_the_routers_own(caplog):
    with agent(b"ray_vllm_x{a=\n") as url:
        text = await told(url)
    assert total(text, "prefillshare_turns_total") == 4
    assert "tells nothing" in caplog.text
