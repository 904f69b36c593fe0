"""Makes docs/metrics.md from the definitions: `python -m prefillshare.metrics_docs > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterable

from prefillshare.kvshare.metric_sizes import Series
from prefillshare.kvshare.metrics import DEFINITIONS, Metric
from prefillshare.kvshare.other_metrics import ENGINE_METRICS, ROUTER_METRICS, OtherMetric

_HEAD = """\
# Metrics

<!-- Made by `python -m prefillshare.metrics_docs > docs/metrics.md`; change kvshare/metrics.py instead. -->

Metrics are in base units. Their labels are bounded: decoders and pools of the deployment, and the outcomes, reasons and states
named below. Every router counts only the turns that it took itself, so sum over the routers. Histograms have `_bucket`, `_sum`
and `_count`. Alerts: [rules.yaml](../deploy/prometheus/rules.yaml).

Where to scrape:

- **One machine**: `GET /metrics` on the router's HTTP port has all metrics, including the engines' own
  ([prometheus.yaml](../deploy/prometheus/prometheus.yaml)). With `router.auth`, metrics with the label `tenant` are left out
  unless the scrape has one of the keys file's `operator_keys` as its `authorization`; a wrong key is refused with 401.
- **Several machines**: Ray's metrics agent on every node (its port is `metrics-export-port`) has what the routers and replicas
  on that node export, so no replica is missed. Ray puts `ray_` before each name; remove it when you scrape, as the chart's
  PodMonitor does. The agent computes the sums of histograms from the middles of their buckets; counts are exact. An agent
  asks for no key, and has thousands of series of Ray's own as well; the PodMonitor keeps few of them
  (`monitoring.podMonitor.rayMetrics`).

| metric | labels | what it is | when it moves |
| --- | --- | --- | --- |
"""


_ENGINES = """
## The engines' own

vLLM and its NIXL connector have many more metrics (https://docs.vllm.ai, "Production metrics"). Those of them that are exported
have `vllm_` where vLLM has `vllm:`. The label `model_name` is the pool, `ReplicaId` is the replica, and `engine` is the rank of
data parallelism.

| metric | what it is | when it moves |
| --- | --- | --- |
"""
_ROUTERS = """
## The router's process

These are on the router's `/metrics` only, without a prefix.

| metric | labels | what it is | when it moves |
| --- | --- | --- | --- |
"""
_SIZE = """
## How much there is to scrape

Nothing that a client sends makes a new series, and what is removed by `prefillshare apply`, or has died, is no longer exported.
A router's `/metrics` has at most this many series; a series is about 90 bytes:

| for | series |
| --- | ---: |
| each decoder | {decoder} |
| each decoder with own layers, besides | {own_layers}, and one for each of its groups |
| each pool | {pool} |
| each tenant, up to a hundred of them | {tenant}, and {tenant_decoder} for each decoder that it has used |
| each engine on the router's machine | {engine} |
| the router itself | {router} |

Ray's agent of a machine exports the same, without the router's process, for all routers and engines on it. Its series are some
hundred bytes longer.
"""


def markdown() -> str:
    return "".join((
        _HEAD, *map(_row, DEFINITIONS.values()),
        _ENGINES, *(_other(metric, metric.help, metric.when) for metric in ENGINE_METRICS.values()),
        _ROUTERS, *(_other(metric, _names(metric.labels), metric.help, metric.when) for metric in ROUTER_METRICS.values()),
        _SIZE.format(**vars(Series.most())),
    ))  # fmt: skip


def _row(metric: Metric) -> str:
    kind = metric.kind.__name__.lower()
    return f"| `{metric.name}` ({kind}) | {_names(metric.labels)} | {metric.help} | {metric.when} |\n"


def _other(metric: OtherMetric, *cells: str) -> str:
    return " | ".join((f"| `{metric.name}` ({metric.kind})", *cells)) + " |\n"


def _names(labels: Iterable[str]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


if __name__ == "__main__":
    print(markdown(), end="")
