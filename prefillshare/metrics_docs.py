"""Makes docs/metrics.md from the definitions: `python -m prefillshare.metrics_docs > docs/metrics.md`."""

from __future__ import annotations

from prefillshare.kvshare.metrics import DEFINITIONS, Metric

_HEAD = """\
# Metrics

<!-- Made by `python -m prefillshare.metrics_docs > docs/metrics.md`; change kvshare/metrics.py instead. -->

Metrics are in base units. Their labels are bounded: decoders and pools of the deployment, and the outcomes, reasons and states
named below. Every router counts only the turns that it took itself, so sum over the routers. Histograms have `_bucket`, `_sum`
and `_count`. Alerts: [rules.yaml](../deploy/prometheus/rules.yaml).

Where to scrape:

- **One machine**: `GET /metrics` on the router's HTTP port has all metrics, including the engines' own
  ([prometheus.yaml](../deploy/prometheus/prometheus.yaml)).
- **Several machines**: Ray's metrics agent on every node (its port is `metrics-export-port`) has what the routers and replicas
  on that node export, so no replica is missed. Ray puts `ray_` before each name; remove it when you scrape, as the chart's
  PodMonitor does. The agent computes the sums of histograms from the middles of their buckets; counts are exact.

| metric | labels | what it is | when it moves |
| --- | --- | --- | --- |
"""


_ENGINES = """
## The engines' own

The engines export vLLM's metrics (https://docs.vllm.ai, "Production metrics") and those of its NIXL connector, with `vllm_`
where vLLM has `vllm:`. The label `model_name` is the pool, and `ReplicaId` is the replica. Look at these first:

| metric | what it is | when it moves |
| --- | --- | --- |
| `vllm_num_requests_running`, `vllm_num_requests_waiting` | requests in a batch, and requests that wait for one | requests wait for long: add replicas |
| `vllm_kv_cache_usage_perc` | KV memory held by requests and leases, 0 to 1 | near 1: raise kv_cache_gib, or add replicas |
| `vllm_num_preemptions_total` | requests that had to give up their blocks | rising: raise kv_cache_gib, add replicas, or raise router.expected_output_tokens |
| `vllm_nixl_xfer_time_seconds`, `vllm_nixl_bytes_transferred` | time and size of NIXL's reads | slower at equal sizes: look at the network hardware |
| `vllm_nixl_num_failed_transfers_total` | reads that failed | above 0: look at the network between the pools |
| `vllm_nixl_num_kv_expired_reqs_total` | leases that ended before they were read | above 0: raise cluster.kv_lease_s |
"""  # noqa: E501 - a table's row is one line


def markdown() -> str:
    return _HEAD + "".join(map(_row, DEFINITIONS.values())) + _ENGINES


def _row(metric: Metric) -> str:
    kind = metric.kind.__name__.lower()
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` ({kind}) | {labels} | {metric.help} | {metric.when} |\n"


if __name__ == "__main__":
    print(markdown(), end="")
