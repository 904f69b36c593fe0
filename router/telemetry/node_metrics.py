"""`GET /metrics` of a router: its own metrics, and behind them what the engines on its machine export through Ray's metrics
agent (vLLM's and NIXL's). A Prometheus that knows nothing of Ray finds all of one machine there; on several, scrape the agents.
"""

from __future__ import annotations

import logging
import re

import httpx

logger = logging.getLogger(__name__)

PATH = "/metrics"
ENGINES = re.compile(rb"^(?:# (?:HELP|TYPE) )?ray_vllm_.*$", re.MULTILINE)
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

        # Neither compressed nor in a format that has an end.
        plain = [(name, value) for name, value in scope["headers"] if not name.lower().startswith(b"accept")]
        await self._app({**scope, "headers": plain}, receive, send_both)

    async def _of_engines(self) -> bytes:
        """As they would be without Ray: it puts its name before theirs. Empty if the agent does not answer."""
        try:
            async with httpx.AsyncClient(timeout=AGENT_S, trust_env=False, verify=False) as client:
                answer = (await client.get(self._agent)).raise_for_status()
        except httpx.HTTPError as error:
            logger.warning("Ray's metrics agent at %s does not answer: %s: %s", self._agent, type(error).__name__, error)
            return b""
        return b"".join(line.replace(b"ray_vllm_", b"vllm_", 1) + b"\n" for line in ENGINES.findall(answer.content))


def agent_of_this_node() -> str | None:
    """In a Ray worker."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == mine and node.get("MetricsExportPort"):
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return None
