"""The metrics of other programs that are exported beside ours (kvshare/metrics.py), in Prometheus' names: those of vLLM and its
NIXL connector in engines, and of the libraries in a router's process. No others are.

Most of vLLM's repeat, per engine, what the router measures per decoder, or describe requests that no client sent (prefills,
probes). What a dashboard, a rule or docs/metrics.md names has to be here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"


@dataclass(frozen=True)
class OtherMetric:
    """`buckets`: whether a histogram's buckets are worth their series; without them, its sum and count are exported."""

    name: str
    kind: Kind
    help: str
    when: str
    labels: tuple[str, ...] = ()
    buckets: bool = False

    @property
    def family(self) -> str:
        """Its name without a counter's ending, as prometheus_client and vLLM name it."""
        return self.name.removesuffix("_total") if self.kind is Kind.COUNTER else self.name

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its series."""
        if self.kind is not Kind.HISTOGRAM:
            return (self.name,)
        return tuple(f"{self.name}_{part}" for part in (*["bucket"] * self.buckets, "sum", "count"))


def _by_family(*metrics: OtherMetric) -> dict[str, OtherMetric]:
    return {metric.family: metric for metric in metrics}


#: How engines name the pool and the replica; `engine` counts the ranks of data parallelism.
OF_ENGINES = ("model_name", "ReplicaId", "engine")


def _of_engine(name: str, kind: Kind, help: str, when: str, buckets: bool = False) -> OtherMetric:
    return OtherMetric(name, kind, help, when, OF_ENGINES, buckets)


ENGINE_METRICS = _by_family(
    _of_engine(
        "vllm_num_requests_running", Kind.GAUGE, "Requests in the batch.", "Near max_num_seqs: add replicas."
    ),
    _of_engine(
        "vllm_num_requests_waiting",
        Kind.GAUGE,
        "Requests that wait for a place in the batch.",
        "Above zero for long: add replicas.",
    ),
    _of_engine(
        "vllm_kv_cache_usage_perc",
        Kind.GAUGE,
        "Share of the KV memory that requests and leases hold, 0 to 1.",
        "Near 1: raise kv_cache_gib, or add replicas.",
    ),
    _of_engine(
        "vllm_num_preemptions_total",
        Kind.COUNTER,
        "Requests that had to give up their blocks.",
        "Rising: raise kv_cache_gib, add replicas, or raise router.expected_output_tokens.",
    ),
    _of_engine(
        "vllm_prompt_tokens_total",
        Kind.COUNTER,
        "Prompt tokens that were processed.",
        "Its rate at prefill, less what is found cached, is the pool's work.",
    ),
    _of_engine(
        "vllm_generation_tokens_total",
        Kind.COUNTER,
        "Tokens generated.",
        "A replica far below the others of its pool is slow, or gets few turns: look at it.",
    ),
    _of_engine(
        "vllm_prefix_cache_queries_total",
        Kind.COUNTER,
        "Prompt tokens that were looked up in the prefix cache.",
        "Compare with vllm_prefix_cache_hits_total.",
    ),
    _of_engine(
        "vllm_prefix_cache_hits_total",
        Kind.COUNTER,
        "Prompt tokens found in the prefix cache.",
        "Falling relative to vllm_prefix_cache_queries_total: contexts are evicted; raise kv_cache_gib.",
    ),
    _of_engine(
        "vllm_nixl_xfer_time_seconds",
        Kind.HISTOGRAM,
        "Time of NIXL's reads.",
        "Slower at equal sizes: look at the network hardware.",
        buckets=True,
    ),
    _of_engine(
        "vllm_nixl_bytes_transferred",
        Kind.HISTOGRAM,
        "Bytes of NIXL's reads (sum), and their number (count).",
        "Smaller reads than before: decode finds more of its prompts in its own cache.",
    ),
    _of_engine(
        "vllm_nixl_num_failed_transfers_total",
        Kind.COUNTER,
        "Reads that failed.",
        "Above 0: look at the network between the pools.",
    ),
    _of_engine(
        "vllm_nixl_num_failed_notifications_total",
        Kind.COUNTER,
        "Messages that end a lease and did not arrive.",
        "Above 0: look at the network between the pools.",
    ),
    _of_engine(
        "vllm_nixl_num_kv_expired_reqs_total",
        Kind.COUNTER,
        "Leases that ended before they were read.",
        "Above 0: raise cluster.kv_lease_s.",
    ),
    _of_engine(
        "vllm_nixl_num_notifications_after_expiry_total",
        Kind.COUNTER,
        "Reads that ended after their lease; decode discards what they brought.",
        "Above 0: raise cluster.kv_lease_s, or look at the network between the pools.",
    ),
    _of_engine(
        "vllm_spec_decode_num_draft_tokens_total",
        Kind.COUNTER,
        "Tokens drafted, with speculative decoding.",
        "Compare with vllm_spec_decode_num_accepted_tokens_total.",
    ),
    _of_engine(
        "vllm_spec_decode_num_accepted_tokens_total",
        Kind.COUNTER,
        "Drafted tokens that were accepted.",
        "Few relative to those drafted: speculation costs more than it saves.",
    ),
)
#: In a router's process.
ROUTER_METRICS = _by_family(
    OtherMetric(
        "http_requests_total",
        Kind.COUNTER,
        "HTTP requests with a key, if keys are needed, by route (none: an unknown one) and class of status.",
        "4xx rising: a client sends what cannot be served; 5xx: look at prefillshare_turns_total and the router's log.",
        ("handler", "status"),
    ),
    OtherMetric("process_cpu_seconds_total", Kind.COUNTER, "CPU time.", "A rate near 1: add routers."),
    OtherMetric("process_resident_memory_bytes", Kind.GAUGE, "Memory.", "Growing without end: a defect; report it."),
    OtherMetric("process_open_fds", Kind.GAUGE, "Open files and connections.", "Near process_max_fds: raise ulimit -n."),
    OtherMetric("process_max_fds", Kind.GAUGE, "Most open files and connections.", "It does not move."),
    OtherMetric(
        "process_start_time_seconds", Kind.GAUGE, "When the router's process began.", "It moved: the router was restarted."
    ),
)
