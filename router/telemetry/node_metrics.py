"""`GET /metrics` of a router: its own metrics, followed by those that the engines on its machine export through Ray's metrics
agent (vLLM's and NIXL's). A Prometheus that knows nothing of Ray finds all metrics of one machine there; with several machines,
scrape the agents.

The answer is bounded by what is deployed (docs/metrics.md): it has only metrics that are described there, of replicas that the
router knows, and no label whose values clients or Ray choose.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Iterator

import httpx
from prometheus_client import REGISTRY, CollectorRegistry, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.samples import Sample
from starlette.responses import Response

from prefillshare.kvshare import metrics_text
from prefillshare.kvshare.metrics import DEFINITIONS
from prefillshare.kvshare.other_metrics import ENGINE_METRICS, ROUTER_METRICS, OtherMetric

logger = logging.getLogger(__name__)

PATH = "/metrics"
#: What Ray puts before every name.
_PREFIX = "ray_"
#: Series of engines -> the metric.
_SERIES = {series: metric for metric in ENGINE_METRICS.values() for series in metric.series}
#: Families of ours.
_OURS = frozenset(metric.family for metric in DEFINITIONS.values())
AGENT_S = 5.0


class NodeMetrics:
    """ASGI middleware. `agent`: URL of the agent's metrics; None: there is none. `replicas`: ids of those that the router
    knows; an agent goes on telling of those that are gone."""

    def __init__(
        self, app, agent: str | None, replicas: Callable[[], Collection[str]], registry: CollectorRegistry = REGISTRY
    ):
        self._app, self._agent, self._replicas, self._registry = app, agent, replicas, registry

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"].rstrip("/") != PATH or scope["method"] != "GET":
            return await self._app(scope, receive, send)
        own, engines = await asyncio.gather(asyncio.to_thread(generate_latest, _Own(self._registry)), self._of_engines())
        await Response(own + engines, media_type=CONTENT_TYPE_PLAIN_0_0_4)(scope, receive, send)

    async def _of_engines(self) -> bytes:
        """The engines' metrics, as they would be without Ray. Empty if the agent does not answer with metrics."""
        if self._agent is None:
            return b""
        known = frozenset(self._replicas())
        try:
            async with httpx.AsyncClient(timeout=AGENT_S, trust_env=False, verify=False) as client:
                answer = (await client.get(self._agent)).raise_for_status()
            return await asyncio.to_thread(lambda: generate_latest(_Engines(answer.text, known)))
        except (httpx.HTTPError, ValueError) as error:
            logger.warning("Ray's metrics agent at %s tells nothing: %s: %s", self._agent, type(error).__name__, error)
            return b""


class _Own:
    """A registry of those metrics of this process that are described."""

    def __init__(self, registry: CollectorRegistry):
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if family.name in _OURS:
                family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                yield family
            elif metric := ROUTER_METRICS.get(family.name):
                yield _told(metric, family.samples)


class _Engines:
    """A registry of the engines' metrics in an agent's text."""

    def __init__(self, text: str, replicas: Collection[str]):
        # Most of the text is Ray's: lines are chosen before they are read.
        chosen = [line for line in text.splitlines() if _name(line) in _SERIES]
        self._samples: dict[str, list[Sample]] = {}
        for family in metrics_text.families("".join(f"{line}\n" for line in chosen)):
            for sample in family.samples:
                if sample.labels.get("ReplicaId") in replicas:
                    name = sample.name.removeprefix(_PREFIX)
                    self._samples.setdefault(_SERIES[name].family, []).append(sample._replace(name=name))

    def collect(self) -> Iterator[Metric]:
        for name, samples in self._samples.items():
            yield _told(ENGINE_METRICS[name], samples)


def _name(line: str) -> str:
    """The name in a line of an agent's text, without Ray's prefix."""
    return line.partition("{")[0].removeprefix(_PREFIX) if line.startswith(_PREFIX) else ""


def _told(metric: OtherMetric, samples: Iterable[Sample]) -> Metric:
    """Its series with the labels that it has here; series that differ in other labels are added up."""
    summed: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in samples:
        if sample.name in metric.series:
            labels = tuple((label, sample.labels[label]) for label in (*metric.labels, "le") if label in sample.labels)
            summed[sample.name, labels] = summed.get((sample.name, labels), 0.0) + sample.value
    family = Metric(metric.family, metric.help, metric.kind.value)
    family.samples = [Sample(name, dict(labels), value) for (name, labels), value in summed.items()]
    return family


def agent_of_this_node() -> str | None:
    """URL of this node's metrics agent; None if it has none. To be called in a Ray worker."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == mine and node.get("MetricsExportPort"):
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return None
