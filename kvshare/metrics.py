"""Definitions of all metrics that this system exports beside vLLM's, in base units and with bounded labels.

`help` says what the figure is; `when` says what to do when it moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
#: Of a lease: what matters is how little is left.
_LEFT_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass(frozen=True)
class Metric:
    name: str
    kind: type
    help: str
    labels: tuple[str, ...]
    when: str
    buckets: tuple[float, ...] = _SECONDS
    #: Values of the labels after decoder or pool that are exported from the start, at 0: a rate needs a value before the first
    #: event. A tuple of values for each where there are several such labels.
    known: tuple[str | tuple[str, ...], ...] = ()
    #: Only for decoders that compute layers of a prompt themselves.
    own_layers: bool = False

    @property
    def family(self) -> str:
        """Its name as prometheus_client has it, without a counter's ending."""
        return self.name.removesuffix("_total")

    @property
    def is_of_tenants(self) -> bool:
        """Whether it shows who the tenants are and what each of them uses."""
        return "tenant" in self.labels

    @property
    def series(self) -> int:
        """How many series it has for each combination of its labels' values."""
        return len(self.buckets) + 3 if self.kind is Histogram else 1


DEFINITIONS = {
    m.name: m
    for m in (
        Metric(
            "prefillshare_turns_total",
            Counter,
            "Turns ended, by outcome (ok, cancelled, limited: refused by a limit of the tenant's own, or the error's name).",
            ("decoder", "outcome"),
            "If errors rise, read the router's log for that error; if it is Overloaded, add replicas.",
            known=("ok", "cancelled", "limited", "InvalidInput", "Overloaded", "DeadlineExceeded", "Unavailable", "Internal"),
        ),
        Metric(
            "prefillshare_turns_in_progress",
            Gauge,
            "Turns that were accepted and have not ended.",
            (),
            "Near router.max_queued: turns are about to be refused; add decode replicas.",
        ),
        Metric(
            "prefillshare_turns_waiting",
            Gauge,
            "Turns that wait for room on prefill or decode replicas.",
            ("pool",),
            "Above zero for long: the pool is at its limit; add decode replicas, or prefill replicas if decode blocks are "
            "free.",
        ),
        Metric(
            "prefillshare_queue_seconds",
            Histogram,
            "Time from a turn's arrival to its start, for turns that started.",
            ("pool",),
            "Near router.max_wait_s: turns are about to be refused; look at prefillshare_turns_refused_total.",
        ),
        Metric(
            "prefillshare_turns_refused_total",
            Counter,
            "Turns refused, by reason (never_fits, no_replica, tenant_limit, turns_per_minute, tokens_per_minute, too_late, "
            "queue_full, waited_too_long).",
            ("pool", "reason"),
            "too_late: add replicas; queue_full: raise router.max_queued, or add replicas; never_fits: raise kv_cache_gib; "
            "many waited_too_long with few too_late: turns take longer than before, so look at the engines; tenant_limit, "
            "turns_per_minute, tokens_per_minute: a tenant asks for more than the keys file gives it.",
            known=(
                "never_fits", "no_replica", "tenant_limit", "turns_per_minute", "tokens_per_minute", "too_late", "queue_full",
                "waited_too_long",
            ),
        ),
        Metric(
            "prefillshare_prefill_tokens_total",
            Counter,
            "Prompt tokens at prefill, by source (cached, computed).",
            ("decoder", "source"),
            "computed rising relative to cached: contexts are evicted, or sessions lose their replica.",
            known=("cached", "computed"),
        ),
        Metric(
            "prefillshare_prefill_tokens_saved_total",
            Counter,
            "Prompt tokens found cached that only other decoders had asked for; a cache per model would have to compute them.",
            ("decoder",),
            "It shows what sharing saves. Falling relative to prefillshare_prefill_tokens_total: agents share their "
            "contexts less.",
        ),
        Metric(
            "prefillshare_cross_model_hits_total",
            Counter,
            "Turns that found something cached which only other decoders had asked for.",
            ("decoder",),
            "Falling relative to prefillshare_turns_total: sessions switch decoders less, or lose their replica.",
        ),
        Metric(
            "prefillshare_placements_total",
            Counter,
            "Calls placed on replicas, by reason (only: there was no other replica; prefix: the replica held most of the "
            "prompt; "
            "load: another one held more but was busier; spread: none held any of it; policy: the policy ignores prefixes).",
            ("pool", "reason"),
            "load rising relative to prefix: busy replicas cost cache hits; add replicas, or weigh prefix more "
            "(router.placement).",
            known=("only", "prefix", "load", "spread", "policy"),
        ),
        Metric(
            "prefillshare_prefills_total",
            Counter,
            "Prefills of turns, by where they are made (here: in the decode engine; there: in a prefill pool; copy: in a "
            "decode engine that had most of it) and why (only: there is no other way; policy: local_prefill; cached: less than "
            "a block was missing; sooner: the first token was expected sooner so; objective: a step here would have taken too "
            "long; unavailable: no prefill replica could get work).",
            ("pool", "where", "why"),
            "unavailable above 0: look at the prefill pool; objective rising: decode engines are busy, add replicas.",
            known=(
                *(("here", why) for why in ("only", "policy", "cached", "sooner", "unavailable")),
                *(("there", why) for why in ("only", "policy", "sooner", "objective")),
                ("copy", "sooner"),
            ),
        ),
        Metric(
            "prefillshare_kv_blocks",
            Gauge,
            "KV blocks of a pool's replicas as last reported, by state (used: held by requests or leases; total).",
            ("pool", "state"),
            "used near total: turns wait for room or are preempted; raise kv_cache_gib, or add replicas.",
            known=("used", "total"),
        ),
        Metric(
            "prefillshare_kept_tokens",
            Gauge,
            "Tokens that tenants keep, by tenant; after a hundred tenants, the others are counted together. Routers that share "
            "a store all give the same figure, which is some seconds old.",
            ("tenant",),
            "Near the tenant's max_kept_tokens, or all together near what router.max_kept_share allows: further ones are "
            "refused; raise these, or kv_cache_gib.",
        ),
        Metric(
            "prefillshare_kept_blocks",
            Gauge,
            "KV blocks that a pool's replicas keep because somebody asked for it, as last told. Every router gives all of "
            "them.",
            ("pool",),
            "Far below prefillshare_kept_tokens divided by the block size: replicas give up what they keep; look at "
            "prefillshare_kept_given_up_blocks_total.",
        ),
        Metric(
            "prefillshare_kept_given_up_blocks_total",
            Counter,
            "Kept blocks that replicas keep no longer, by reason (pressure: requests needed the room; expired; let_go; gone: "
            "their content was invalid, or the cache was reset). Every router counts those of all replicas.",
            ("pool", "reason"),
            "pressure rising: more is kept than fits beside the requests; lower router.max_kept_share, or raise kv_cache_gib.",
            known=("pressure", "expired", "let_go", "gone"),
        ),
        Metric(
            "prefillshare_keeps_total",
            Counter,
            "Times that a context was to be kept, or kept for longer, on a replica, by outcome (done, failed).",
            ("outcome",),
            "failed rising: replicas are lost, or do not come to work behind all turns; read the router's log.",
            known=("done", "failed"),
        ),
        Metric(
            "prefillshare_keep_prefill_tokens_total",
            Counter,
            "Tokens computed because a context is kept.",
            (),
            "Rising without new contexts: replicas that kept some were lost, or have given them up.",
        ),
        Metric(
            "prefillshare_keeps_refused_total",
            Counter,
            "Contexts, or growths of contexts, that are not kept, by reason (never_fits: longer than the tenant may ever keep; "
            "own_budget: beyond what the tenant may keep; all_budget: beyond what all tenants together may keep).",
            ("reason",),
            "own_budget: raise the tenant's max_kept_tokens; all_budget: raise router.max_kept_share, or kv_cache_gib.",
            known=("never_fits", "own_budget", "all_budget"),
        ),
        Metric(
            "prefillshare_kv_load_seconds",
            Histogram,
            "Time from asking for a prompt's KV until the decode replica has all of it, for turns that had to read some.",
            ("decoder",),
            "Rising while sizes stay equal: look at the network between prefill and decode, and at "
            "vllm_nixl_xfer_time_seconds.",
        ),
        Metric(
            "prefillshare_lease_margin_seconds",
            Histogram,
            "Time left of the lease on a prompt's KV when the KV had been read.",
            ("decoder",),
            "Near zero: reads will soon be late and have to be repeated; raise cluster.kv_lease_s.",
            _LEFT_S,
        ),
        Metric(
            "prefillshare_late_reads_total",
            Counter,
            "Reads of a prompt's KV that were given up because its lease had ended; the turn was taken up again.",
            ("decoder",),
            "Above 0: raise cluster.kv_lease_s, or look at the network between prefill and decode.",
        ),
        Metric(
            "prefillshare_eager_prefills_total",
            Counter,
            "Eager prefills of a response, by outcome (done, needless, cancelled, dropped, failed).",
            ("outcome",),
            "cancelled rising: next turns arrive before the pool has finished; dropped: raise router.eager_prefill_max.",
            known=("done", "needless", "cancelled", "dropped", "failed"),
        ),
        Metric(
            "prefillshare_eager_prefill_tokens_total",
            Counter,
            "Tokens computed by eager prefills.",
            (),
            "This work no longer counts into the next turns' time to first token.",
        ),
        Metric(
            "prefillshare_pull_backs_total",
            Counter,
            "Loans of a response's KV by decode engines, by outcome (done, needless, declined, dropped, unwanted, failed).",
            ("outcome",),
            "failed rising: look at the network; declined: computing is faster; dropped: raise router.pull_back_max.",
            known=("done", "needless", "declined", "dropped", "unwanted", "failed"),
        ),
        Metric(
            "prefillshare_pulled_back_tokens_total",
            Counter,
            "Tokens whose KV the prefill pool has pulled from decode engines.",
            (),
            "It shows how much prefill did not have to be computed again.",
        ),
        Metric(
            "prefillshare_completion_tokens_total",
            Counter,
            "Tokens generated.",
            ("decoder",),
            "Its rate is the throughput of a decoder.",
        ),
        Metric(
            "prefillshare_tenant_turns_total",
            Counter,
            "Turns admitted, by tenant; after a hundred tenants, the others are counted together.",
            ("tenant", "decoder"),
            "It shows who uses the system. The ledger (prefillshare usage) has the exact figures, also after a restart.",
        ),
        Metric(
            "prefillshare_tenant_tokens_total",
            Counter,
            "Tokens used by tenants, by kind (prompt; cached and computed, as at prefill; generated).",
            ("tenant", "decoder", "kind"),
            "computed rising relative to cached for one tenant: its calls share less; look at how it lays out its prompts.",
            known=("prompt", "cached", "computed", "generated"),
        ),
        Metric(
            "prefillshare_tenant_kv_byte_seconds_total",
            Counter,
            "Bytes of KV that tenants' turns held on decode replicas, times the seconds for which they held them.",
            ("tenant", "decoder"),
            "Its rate is how much of the decode replicas' KV memory a tenant holds.",
        ),
        Metric(
            "prefillshare_usage_unwritten_seconds",
            Gauge,
            "How long the oldest usage of this router waits to be written to Redis.",
            (),
            "Above a second: Redis does not take it; look at Redis. If the router ends before that, the usage is lost.",
        ),
        Metric(
            "prefillshare_turns_limited_alone_total",
            Counter,
            "Turns whose tenant's limits this router applied by itself, because Redis did not answer.",
            (),
            "Above 0: tenants may get up to their limits from each router; look at Redis.",
        ),
        Metric(
            "prefillshare_kv_transfer_bytes_total",
            Counter,
            "Bytes of KV that decode replicas pulled from prefill replicas.",
            ("decoder",),
            "Rising faster than prefill tokens: decode caches are too small to keep shared prefixes.",
        ),
        Metric(
            "prefillshare_own_layer_turns_total",
            Counter,
            "Turns, by the layers that the decoder computed itself over the prompt (none, or a group like 4-9).",
            ("decoder", "layers"),
            "Fewer layers than before: with more, the pool cannot meet ttft_objective_s; add decode replicas.",
        ),
        Metric(
            "prefillshare_canary_divergence",
            Histogram,
            "On sampled turns: divergence of a token's distribution from the one that the decoder has over its own "
            "prefill, nats.",
            ("decoder",),
            "Mean above prefillshare_quality_floor: other layers matter for this data; run prefillshare profile with such "
            "data.",
            (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
            own_layers=True,
        ),
        Metric(
            "prefillshare_quality_floor",
            Gauge,
            "Divergence from its own prefill that the deployment allows to a decoder (quality_floor of its pool), nats.",
            ("decoder",),
            "It moves only when the deployment changes.",
        ),
        Metric(
            "prefillshare_canary_turns_total",
            Counter,
            "Sampled turns, by outcome (done, dropped, failed).",
            ("decoder", "outcome"),
            "dropped: lower router.canary_share; failed: read the router's log.",
            known=("done", "dropped", "failed"),
            own_layers=True,
        ),
        Metric(
            "prefillshare_background_failures_total",
            Counter,
            "Background work that ended in an unforeseen error, by task (eager_prefill, pull_back, loan_release, "
            "handoff_release, canary, replica_question, usage_tidying, limit_settling, keeping).",
            ("task",),
            "Above 0: a defect of prefillshare; turns go on without this work. The router's log has the error and the session "
            "or request.",
            known=(
                "eager_prefill", "pull_back", "loan_release", "handoff_release", "canary", "replica_question", "usage_tidying",
                "limit_settling", "keeping",
            ),
        ),
        Metric(
            "prefillshare_resumes_total",
            Counter,
            "Turns taken up again, by reason (preempted, kv_load_failed, gone, wedged, unavailable).",
            ("decoder", "reason"),
            "preempted: give decode more KV memory; kv_load_failed: look at the network or the lease; others: a replica fails.",
            known=("preempted", "kv_load_failed", "gone", "wedged", "unavailable"),
        ),
        Metric(
            "prefillshare_predicted_cached_tokens_total",
            Counter,
            "Prompt tokens that the chosen prefill replica had cached according to the router's index.",
            ("pool",),
            "Compare with prefillshare_actual_cached_tokens_total.",
        ),
        Metric(
            "prefillshare_actual_cached_tokens_total",
            Counter,
            "Prompt tokens that the chosen prefill replica really had cached.",
            ("pool",),
            "Falling relative to all prompt tokens: contexts are evicted; give prefill more KV cache.",
        ),
        Metric(
            "prefillshare_prediction_error_tokens",
            Histogram,
            "Difference between predicted and actual cached tokens of a prompt.",
            ("pool",),
            "Growing: KV events arrive late or not at all; look at the network between engines and routers.",
            (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        ),
        Metric(
            "prefillshare_replicas",
            Gauge,
            "Replicas that the router knows, by state (usable, ejected).",
            ("pool", "state"),
            "ejected above 0: that replica fails or does not answer; read its log.",
            known=("usable", "ejected"),
        ),
        Metric(
            "prefillshare_time_to_first_token_seconds",
            Histogram,
            "Time from a turn's arrival to its first token.",
            ("decoder",),
            "Compare with prefillshare_prefill_seconds to see whether prefill or decode waits.",
        ),
        Metric(
            "prefillshare_prefill_seconds",
            Histogram,
            "Duration of the prefill call, as the router sees it.",
            ("decoder",),
            "Rising: add prefill replicas, or look for lost cache hits.",
        ),
        Metric(
            "prefillshare_inter_token_seconds",
            Histogram,
            "Time between a turn's tokens, after the first; tokens that arrive together share the time.",
            ("decoder",),
            "Rising with running turns: the decode pool is busy; add replicas. Single long gaps: turns are preempted.",
            (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        ),
        Metric(
            "prefillshare_decode_seconds",
            Histogram,
            "Time from a turn's first token to its end.",
            ("decoder",),
            "Compare with prefillshare_completion_tokens_total to see whether answers are longer or slower.",
        ),
        Metric(
            "prefillshare_turn_seconds",
            Histogram,
            "Time from a turn's arrival to its end.",
            ("decoder",),
            "This is the latency that users notice.",
        ),
        Metric(
            "prefillshare_sessions",
            Gauge,
            "Sessions that are held. Routers that share a store all give the same figure, which is some seconds old.",
            (),
            "Near router.max_sessions: lower the TTL or raise the limit.",
        ),
    )
}


class Metrics:
    """The metrics above, registered once per process. Access by name without prefix and unit: `m["turns_total"]`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY):
        self._metrics = {
            _short(m): m.kind(
                m.name, m.help, m.labels, registry=registry, **({"buckets": m.buckets} if m.kind is Histogram else {})
            )
            for m in DEFINITIONS.values()
        }

    def expect(self, decoders: Iterable[str], pools: Iterable[str], own_layers: Iterable[str] = ()) -> None:
        """Export the metrics with labels for these decoders and pools from now on, before anything is counted; those of tenants
        not before they use something, because there may be many. `own_layers`: those decoders that compute layers of a prompt
        themselves."""
        values = {"decoder": list(decoders), "pool": list(pools)}
        for m in DEFINITIONS.values():
            if not m.labels or m.kind is Gauge or m.is_of_tenants:
                continue
            of = [values[label] for label in m.labels if label in values]
            if m.own_layers:
                of = [list(own_layers)]
            for chosen, known in product(product(*of), _known(m)):
                self[_short(m)].labels(*chosen, *known)

    def forget(self, decoders: Iterable[str] = (), pools: Iterable[str] = ()) -> None:
        """Export nothing any more of decoders and pools that are gone. If one comes back, its counters begin at 0."""
        gone = [("decoder", name) for name in decoders] + [("pool", name) for name in pools]
        for m in DEFINITIONS.values():
            for label, value in gone:
                if label in m.labels:
                    self[_short(m)].remove_by_labels({label: value})

    def __getitem__(self, name: str):
        return self._metrics[name]


def _short(metric: Metric) -> str:
    return metric.name.removeprefix("prefillshare_")


def _known(metric: Metric) -> list[tuple[str, ...]]:
    """Values of the labels after decoder or pool; one empty tuple where there are none."""
    if not set(metric.labels) - {"decoder", "pool"}:
        return [()]
    return [(one,) if isinstance(one, str) else one for one in metric.known]
