"""`GET /metrics` of a router: its own metrics, followed by those that the engines on its machine export through Ray's metrics
agent (vLLM's and NIXL's). A Prometheus that knows nothing of Ray finds all metrics of one machine there; with several machines,
scrape the agents.

The answer is bounded by what is deployed (docs/metrics.md): it has only metrics that are described there, of replicas that the
router knows, and no label whose values clients or Ray choose. What shows who the tenants are is there for operators only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from http import HTTPStatus

import httpx
from prometheus_client import REGISTRY, CollectorRegistry, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.samples import Sample
from starlette.datastructures import Headers
from starlette.responses import Response

from prefillshare.kvshare import metrics_text
from prefillshare.kvshare.errors import NotFound, Unauthenticated
from prefillshare.kvshare.metrics import DEFINITIONS
from prefillshare.kvshare.other_metrics import ENGINE_METRICS, ROUTER_METRICS, OtherMetric
from prefillshare.kvshare_vllm.surface.http_errors import HttpError, refuse

logger = logging.getLogger(__name__)

PATH = "/metrics"
_METHODS = ("GET", "HEAD")
#: What Ray puts before every name.
_PREFIX = "ray_"
#: Series of engines -> the metric.
_SERIES = {series: metric for metric in ENGINE_METRICS.values() for series in metric.series}
#: Families of ours, and those of them that anybody may see.
_OURS = frozenset(metric.family for metric in DEFINITIONS.values())
_OF_ALL = frozenset(metric.family for metric in DEFINITIONS.values() if not metric.is_of_tenants)
AGENT_S = 5.0


class NodeMetrics:
    """ASGI middleware. It answers for all that begins with PATH, because vLLM's app shows its whole registry there, whatever
    the method. `agent`: URL of the agent's metrics; None: there is none. `replicas`: ids of those that the router knows; an
    agent goes on telling of those that are gone. `shows_all`: whether whoever sends these headers may see what tells of
    tenants; raises Unauthenticated."""

    def __init__(
        self,
        app,
        agent: str | None,
        replicas: Callable[[], Collection[str]],
        shows_all: Callable[[Headers], bool],
        registry: CollectorRegistry = REGISTRY,
    ):
        self._app, self._agent, self._replicas, self._shows_all, self._registry = app, agent, replicas, shows_all, registry
        self._asking: asyncio.Task[bytes] | None = None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not scope["path"].startswith(PATH):
            return await self._app(scope, receive, send)
        if scope["path"].rstrip("/") != PATH:
            return await refuse(HttpError.of(NotFound("there is nothing here", fix=f"ask for {PATH}")), scope, receive, send)
        if scope["method"] not in _METHODS:
            status = HTTPStatus.METHOD_NOT_ALLOWED
            error = HttpError(status.value, f"{PATH} is only read", status.phrase)
            return await refuse(error, scope, receive, send, headers={"allow": ", ".join(_METHODS)})
        try:
            families = _OURS if self._shows_all(Headers(scope=scope)) else _OF_ALL
        except Unauthenticated as error:
            return await refuse(HttpError.of(error), scope, receive, send, headers={"www-authenticate": "Bearer"})
        own = asyncio.to_thread(generate_latest, _Own(self._registry, families))
        own, engines = await asyncio.gather(own, self._of_engines())
        await Response(own + engines, media_type=CONTENT_TYPE_PLAIN_0_0_4)(scope, receive, send)

    async def _of_engines(self) -> bytes:
        """The engines' metrics, as they would be without Ray. Who asks while the agent is being asked waits for that answer:
        anybody may ask as often as they like."""
        if self._agent is None:
            return b""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_agent())
        return await asyncio.shield(self._asking)

    async def _ask_agent(self) -> bytes:
        """Empty if the agent does not answer with metrics."""
        known = frozenset(self._replicas())
        try:
            async with httpx.AsyncClient(timeout=AGENT_S, trust_env=False, verify=False) as client:
                answer = (await client.get(self._agent)).raise_for_status()
            return await asyncio.to_thread(lambda: generate_latest(_Engines(answer.text, known)))
        except (httpx.HTTPError, ValueError) as error:
            logger.warning("Ray's metrics agent at %s tells nothing: %s: %s", self._agent, type(error).__name__, error)
            return b""


class _Own:
    """A registry of those metrics of this process that are described; of ours, of these families."""

    def __init__(self, registry: CollectorRegistry, families: Collection[str]):
        self._registry, self._families = registry, families

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if family.name in self._families:
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
