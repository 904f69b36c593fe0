"""`GET /metrics` of a router: its own metrics, followed by those that the engines on its machine export through Ray's metrics
agent (vLLM's and NIXL's). A Prometheus that knows nothing of Ray finds all metrics of one machine there; with several machines,
scrape the agents.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import httpx
from prometheus_client import Metric, generate_latest

from prefillshare.kvshare import metrics_text

logger = logging.getLogger(__name__)

PATH = "/metrics"
#: The engines' prefix, in front of which Ray puts its own.
_OF_ENGINES = "ray_vllm_"
AGENT_S = 5.0


class NodeMetrics:
    """ASGI middleware. `agent`: URL of the agent's metrics; None: there is none."""

    def __init__(self, app, agent: str | None):
        self._app, self._agent = app, agent

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"].rstrip("/") != PATH or not self._agent:
            return await self._app(scope, receive, send)
        engines = await self._of_engines()

        async def send_both(message):
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() != b"content-length"]
                message = {**message, "headers": kept}
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                message = {**message, "body": message.get("body", b"") + engines}
            await send(message)

        # Without these headers the answer is neither compressed nor in a format with an end marker: more can follow it.
        plain = [(name, value) for name, value in scope["headers"] if not name.lower().startswith(b"accept")]
        await self._app({**scope, "headers": plain}, receive, send_both)

    async def _of_engines(self) -> bytes:
        """The engines' metrics, as they would be without Ray. Empty if the agent does not answer with metrics."""
        try:
            async with httpx.AsyncClient(timeout=AGENT_S, trust_env=False, verify=False) as client:
                answer = (await client.get(self._agent)).raise_for_status()
            return await asyncio.to_thread(generate_latest, _Engines(answer.text))
        except (httpx.HTTPError, ValueError) as error:
            logger.warning("Ray's metrics agent at %s tells nothing: %s: %s", self._agent, type(error).__name__, error)
            return b""


class _Engines:
    """A registry of the engines' metrics in an agent's text."""

    def __init__(self, text: str):
        self._text = text

    def collect(self) -> Iterator[Metric]:
        for family in metrics_text.families(self._text):
            if family.name.startswith(_OF_ENGINES):
                family.name = family.name.removeprefix("ray_")
                family.samples = [sample._replace(name=sample.name.removeprefix("ray_")) for sample in family.samples]
                yield family


def agent_of_this_node() -> str | None:
    """URL of this node's metrics agent; None if it has none. To be called in a Ray worker."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == mine and node.get("MetricsExportPort"):
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return None
