"""docs/metrics.md, made from the definitions: `python -m prefillshare.metrics_docs > docs/metrics.md`."""

from __future__ import annotations

from prefillshare.kvshare.metrics import DEFINITIONS, Metric

_HEAD = """\
# Metrics

<!-- Made by `python -m prefillshare.metrics_docs > docs/metrics.md`; change kvshare/metrics.py instead. -->

Base units, bounded labels: decoders and pools of the deployment, and the outcomes, reasons and states named below. Every router
counts the turns that it took itself: sum over them. Histograms have `_bucket`, `_sum` and `_count`. Alerts:
[rules.yaml](../deploy/prometheus/rules.yaml).

Where to scrape:

- **One machine**: `GET /metrics` on the router's HTTP port has it all, the engines' own metrics included
  ([prometheus.yaml](../deploy/prometheus/prometheus.yaml)).
- **Several**: Ray's metrics agent on every node (its port is `metrics-export-port`) has what the routers and replicas there
  export, so no replica is missed. Ray puts `ray_` before each name: take it away again, as the chart's PodMonitor does. Sums of
  histograms are there made of the middles of their buckets; counts are exact.

| metric | labels | what it is | when it moves |
| --- | --- | --- | --- |
"""


_ENGINES = """
## The engines' own

vLLM's metrics (https://docs.vllm.ai, "Production metrics") and those of its NIXL connector, with `vllm_` where vLLM has
`vllm:`; `model_name` is the pool, `ReplicaId` the replica. Those to look at first:

| metric | what it is | when it moves |
| --- | --- | --- |
| `vllm_num_requests_running`, `vllm_num_requests_waiting` | in a batch, and before it | waiting for long: add replicas |
| `vllm_kv_cache_usage_perc` | KV memory held by requests and leases, 0 to 1 | near 1: raise kv_cache_gib, or add replicas |
| `vllm_num_preemptions_total` | gave up their blocks | rising: as above, or raise router.expected_output_tokens |
| `vllm_nixl_xfer_time_seconds`, `vllm_nixl_bytes_transferred` | NIXL's reads | slower at equal sizes: look at the fabric |
| `vllm_nixl_num_failed_transfers_total` | reads that failed | above 0: look at the network between the pools |
| `vllm_nixl_num_kv_expired_reqs_total` | leases that ended before they were read | above 0: raise cluster.kv_lease_s |
"""


def markdown() -> str:
    return _HEAD + "".join(map(_row, DEFINITIONS.values())) + _ENGINES


def _row(metric: Metric) -> str:
    kind = metric.kind.__name__.lower()
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` ({kind}) | {labels} | {metric.help} | {metric.when} |\n"


if __name__ == "__main__":
    print(markdown(), end="")
