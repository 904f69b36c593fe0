"""Grafana dashboards as code: `python deploy/grafana/dashboards.py` writes a JSON file each beside this one.

Queries use the routers' metrics and vLLM's (docs/metrics.md); `$datasource`, and `$decoder`, `$pool` or `$tenant`, are chosen
above the panels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableOption, VariableRefresh

HERE = Path(__file__).parent
#: Rates are over this; Grafana makes it at least four scrapes.
RATE = "$__rate_interval"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT, WIDTH = 8, 8


@dataclass(frozen=True)
class Panel:
    """`unit`: Grafana's. `queries`: PromQL -> legend. `about`: what it shows, and what to do when it moves."""

    title: str
    unit: str
    queries: dict[str, str]
    about: str


@dataclass(frozen=True)
class Board:
    """`label`: by what its queries may be narrowed ("decoder", "pool" or "tenant")."""

    uid: str
    title: str
    label: str
    rows: dict[str, tuple[Panel, ...]]
    #: Further variables, each with its values.
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def panels(self) -> Iterator[Panel]:
        for panels in self.rows.values():
            yield from panels


def _of(metric: str, **labels: str) -> str:
    """The metric of the chosen decoders or pools."""
    matched = ",".join(f'{label}=~"{value}"' for label, value in labels.items())
    return f"{metric}{{{matched}}}" if matched else metric


def _rate(metric: str, by: str = "", **labels: str) -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({_of(metric, **labels)}[{RATE}]))"


def _quantiles(metric: str, of: tuple[float, ...] = (0.5, 0.95, 0.99), **labels: str) -> dict[str, str]:
    return {f"histogram_quantile({q}, {_rate(metric + '_bucket', 'le', **labels)})": f"p{q * 100:g}" for q in of}


def _mean(metric: str, by: str, **labels: str) -> str:
    return f"{_rate(metric + '_sum', by, **labels)} / {_rate(metric + '_count', by, **labels)}"


DECODER, POOL, TENANT = {"decoder": "$decoder"}, {"pool": "$pool"}, {"tenant": "$tenant"}
#: As vLLM's metrics name a pool.
ENGINES = {"model_name": "$pool"}
IN_ENGINES = {
    f"sum by (model_name) ({_of(f'vllm_num_requests_{state}', **ENGINES)})": f"{{{{model_name}}}}, {state}"
    for state in ("running", "waiting")
}
TOKENS, USED = "prefillshare_prefill_tokens_total", "prefillshare_tenant_tokens_total"
HIT = f'{_rate(TOKENS, source="cached", **DECODER)} / {_rate(TOKENS, **DECODER)}'
HIT_BY_DECODER = f'{_rate(TOKENS, "decoder", source="cached", **DECODER)} / {_rate(TOKENS, "decoder", **DECODER)}'

BOARDS = (
    Board("prefillshare-overview", "prefillshare: overview", "decoder", {
        "What users feel": (
            Panel("Turns", "reqps", {_rate("prefillshare_turns_total", "outcome", **DECODER): "{{outcome}}"},
                  "Turns that ended, by outcome. If errors rise, read the router's log for that error; if it is Overloaded, "
                  "add replicas."),
            Panel("Latency of a turn", "s", _quantiles("prefillshare_turn_seconds", **DECODER),
                  "From arrival to the last token."),
            Panel("Time to first token", "s", _quantiles("prefillshare_time_to_first_token_seconds", **DECODER),
                  "Compare with the time of prefill to see whether prefill or decode waits."),
        ),
        "What sharing saves": (
            Panel("Prefix-cache hit ratio", "percentunit", {HIT: "all", HIT_BY_DECODER: "{{decoder}}"},
                  "Share of prompt tokens found cached at prefill. Falling: contexts are evicted (more KV memory for prefill), "
                  "or sessions lose their replica."),
            Panel("Prompt tokens at prefill", "short", {_rate(TOKENS, "source", **DECODER): "{{source}} a second"},
                  "Cached tokens cost nothing."),
            Panel("Errors", "percentunit",
                  {f'{_rate("prefillshare_turns_total", outcome="[A-Z].*", **DECODER)} / '
                   f'{_rate("prefillshare_turns_total", **DECODER)}': "of all turns"},
                  "Share of turns that ended with an error."),
        ),
        "Under way": (
            Panel("Turns in progress", "short", {"sum (prefillshare_turns_in_progress)": "in progress"},
                  "Near router.max_queued, turns are refused: add decode replicas."),
            Panel("Sessions", "short", {"max (prefillshare_sessions)": "sessions"},
                  "Near router.max_sessions: lower the TTL or raise the limit."),
            Panel("Tokens generated", "short",
                  {_rate("prefillshare_completion_tokens_total", "decoder", **DECODER): "{{decoder}}"},
                  "Per second, by decoder."),
        ),
    }),
    Board("prefillshare-cache", "prefillshare: cache and sharing", "decoder", {
        "Hits": (
            Panel("Hit ratio by decoder", "percentunit", {HIT_BY_DECODER: "{{decoder}}"},
                  "A decoder far below the others has contexts of its own, or is the first to be asked in its sessions."),
            Panel("Computed tokens", "short", {_rate(TOKENS, "decoder", source="computed", **DECODER): "{{decoder}}"},
                  "Per second. This is the prefill pool's work."),
            Panel("Saved by sharing", "short",
                  {_rate("prefillshare_prefill_tokens_saved_total", "decoder", **DECODER): "{{decoder}}"},
                  "Tokens per second that a cache per model would have computed: they were found cached, but only other "
                  "decoders had asked for them."),
            Panel("Turns with a hit across models", "percentunit",
                  {f'{_rate("prefillshare_cross_model_hits_total", "decoder", **DECODER)} / '
                   f'{_rate("prefillshare_turns_total", "decoder", **DECODER)}': "{{decoder}}"},
                  "Falling: sessions switch decoders less, or lose their replica."),
            Panel("Index: predicted against actual", "short",
                  {_rate("prefillshare_predicted_cached_tokens_total", "pool"): "predicted, {{pool}}",
                   _rate("prefillshare_actual_cached_tokens_total", "pool"): "actual, {{pool}}"},
                  "What the replica had cached according to the router's index, and what it had. If they differ, KV events "
                  "arrive late or never."),
        ),
        "KV made ahead": (
            Panel("Eager prefills", "reqps", {_rate("prefillshare_eager_prefills_total", "outcome"): "{{outcome}}"},
                  "cancelled rising: next turns arrive before the pool has finished; dropped: raise router.eager_prefill_max."),
            Panel("Pull-backs", "reqps", {_rate("prefillshare_pull_backs_total", "outcome"): "{{outcome}}"},
                  "Mode icarus. failed rising: look at the network; declined: computing is faster."),
            Panel("Tokens that no turn waits for", "short",
                  {_rate("prefillshare_eager_prefill_tokens_total"): "computed ahead",
                   _rate("prefillshare_pulled_back_tokens_total"): "pulled back"},
                  "Per second."),
        ),
        "Kept contexts": (
            Panel("Tokens kept, by tenant", "short", {"max by (tenant) (prefillshare_kept_tokens)": "{{tenant}}"},
                  "Near a tenant's max_kept_tokens, or all together near what router.max_kept_share allows: further ones are "
                  "refused."),
            Panel("Share of the pool's blocks kept", "percentunit",
                  {"max by (pool) (prefillshare_kept_blocks) / "
                   'max by (pool) (prefillshare_kv_blocks{state="total"})': "{{pool}}"},
                  "Above router.max_kept_share for one pool: what is kept lies unevenly."),
            Panel("Given up", "short",
                  {f"max by (pool, reason) (rate(prefillshare_kept_given_up_blocks_total[{RATE}]))": "{{pool}}: {{reason}}"},
                  "Blocks per second. pressure: more is kept than fits beside the requests; lower router.max_kept_share, or "
                  "raise kv_cache_gib."),
            Panel("Refused", "reqps", {_rate("prefillshare_keeps_refused_total", "reason"): "{{reason}}"},
                  "own_budget: raise the tenant's max_kept_tokens; all_budget: raise router.max_kept_share, or kv_cache_gib."),
            Panel("Kept, or prolonged, on a replica", "reqps", {_rate("prefillshare_keeps_total", "outcome"): "{{outcome}}"},
                  "failed rising: replicas are lost, or do not come to work behind all turns; read the router's log."),
            Panel("Computed to be kept", "short", {_rate("prefillshare_keep_prefill_tokens_total"): "tokens a second"},
                  "Rising without new contexts: replicas that kept some were lost, or have given them up."),
        ),
        "Decoders' own layers (DroidSpeak)": (
            Panel("Layers computed", "reqps",
                  {_rate("prefillshare_own_layer_turns_total", "decoder, layers", **DECODER): "{{decoder}}: {{layers}}"},
                  "Fewer than before: with more, the pool cannot meet ttft_objective_s; add decode replicas."),
            Panel("Divergence of sampled turns", "short",
                  {_mean("prefillshare_canary_divergence", "decoder", **DECODER): "{{decoder}}",
                   f'max by (decoder) ({_of("prefillshare_quality_floor", **DECODER)})': "{{decoder}}: floor"},
                  "Distance from the decoder's own prefill, nats. Above its floor: run prefillshare profile with recent data."),
            Panel("Sampled turns", "reqps", {_rate("prefillshare_canary_turns_total", "outcome", **DECODER): "{{outcome}}"},
                  "dropped: lower router.canary_share; failed: read the router's log."),
        ),
    }),
    Board("prefillshare-transfer", "prefillshare: KV transfer", "decoder", {
        "From prefill to decode": (
            Panel("KV moved", "Bps", {_rate("prefillshare_kv_transfer_bytes_total", "decoder", **DECODER): "{{decoder}}"},
                  "Rising faster than prefill tokens: decode caches are too small to keep shared prefixes."),
            Panel("KV moved per turn", "bytes",
                  {f'{_rate("prefillshare_kv_transfer_bytes_total", "decoder", **DECODER)} / '
                   f'{_rate("prefillshare_turns_total", "decoder", **DECODER)}': "{{decoder}}"},
                  "It falls if a session's turns go back to the same decode replica."),
            Panel("Turns taken up again", "reqps", {_rate("prefillshare_resumes_total", "reason", **DECODER): "{{reason}}"},
                  "preempted: give decode more KV memory; kv_load_failed: look at the network or the lease; others: a replica "
                  "fails."),
        ),
        "Loads and leases": (
            Panel("Time to load a prompt's KV", "s", _quantiles("prefillshare_kv_load_seconds", **DECODER),
                  "For turns that had to read some KV. Rising while sizes stay equal: look at the network."),
            Panel("Left of the lease", "s", _quantiles("prefillshare_lease_margin_seconds", (0.01, 0.5), **DECODER),
                  "Time left when the KV had been read. Near zero: reads will soon be late; raise cluster.kv_lease_s."),
            Panel("Late reads", "reqps", {_rate("prefillshare_late_reads_total", "decoder", **DECODER): "{{decoder}}"},
                  "Reads that were given up because the lease had ended; the turns were taken up again. Raise "
                  "cluster.kv_lease_s."),
            Panel("KV moved per turn, distribution", "bytes",
                  {f'{_rate("vllm_nixl_bytes_transferred_sum", "model_name")} / '
                   f'{_rate("vllm_nixl_bytes_transferred_count", "model_name")}': "{{model_name}}, per read"},
                  "Mean size of NIXL's reads. Small ones cost more per byte."),
        ),
        "NIXL": (
            Panel("Time of a read", "s", _quantiles("vllm_nixl_xfer_time_seconds"),
                  "From posting to its end, as NIXL measures it. Rising while sizes stay equal: the network is slow or "
                  "shared."),
            Panel("Failures", "reqps",
                  {f"{_rate(f'vllm_nixl_num_{what}_total')} or vector(0)": what.replace("_", " ")
                   for what in ("failed_transfers", "failed_notifications", "kv_expired_reqs")},
                  "kv expired reqs: leases that ended before they were read; raise cluster.kv_lease_s. Others: look at the "
                  "network."),
        ),
    }),
    Board("prefillshare-prefill", "prefillshare: prefill pools", "pool", {
        "Work": (
            Panel("Prefill leg", "s", _quantiles("prefillshare_prefill_seconds"),
                  "As the router sees it. Rising: add prefill replicas, or look for lost cache hits."),
            Panel("Tokens computed", "short", {_rate("vllm_prompt_tokens_total", "model_name", **ENGINES): "{{model_name}}"},
                  "Prompt tokens per second, as the engines count them."),
            Panel("Requests in the engines", "short", IN_ENGINES,
                  "Waiting for long in a prefill pool: lower router.max_queued_prefill_tokens, or add replicas."),
        ),
        "Cache": (
            Panel("KV cache in use", "percentunit",
                  {f'max by (model_name) ({_of("vllm_kv_cache_usage_perc", **ENGINES)})': "{{model_name}}, fullest replica"},
                  "Held by requests and leases. Near 1: raise kv_cache_gib, or add replicas."),
            Panel("Engines' own hit ratio", "percentunit",
                  {f'{_rate("vllm_prefix_cache_hits_total", "model_name", **ENGINES)} / '
                   f'{_rate("vllm_prefix_cache_queries_total", "model_name", **ENGINES)}': "{{model_name}}"},
                  "Share of the tokens that were looked up, including those of eager prefills and probes."),
            Panel("Prediction error", "short", {_mean("prefillshare_prediction_error_tokens", "pool", **POOL): "{{pool}}"},
                  "Mean number of tokens by which the index was wrong. Growing: look at the network between engines and "
                  "routers."),
        ),
    }),
    Board("prefillshare-decode", "prefillshare: decode pools", "pool", {
        "Speed": (
            Panel("Between tokens", "s", _quantiles("prefillshare_inter_token_seconds"),
                  "Rising with running turns: the pools are busy; add replicas. Single long gaps: turns are preempted."),
            Panel("Decoding of a turn", "s", _quantiles("prefillshare_decode_seconds"), "From its first token to its end."),
            Panel("Tokens generated", "short",
                  {_rate("vllm_generation_tokens_total", "model_name", **ENGINES): "{{model_name}}"},
                  "Per second, as the engines count them."),
        ),
        "Room": (
            Panel("KV blocks", "short",
                  {f'max by (pool, state) ({_of("prefillshare_kv_blocks", **POOL)})': "{{pool}}: {{state}}"},
                  "used near total: turns wait for room or are preempted; raise kv_cache_gib, or add replicas."),
            Panel("Requests in the engines", "short", IN_ENGINES,
                  "Running near max_num_seqs: add replicas."),
            Panel("Preemptions", "reqps",
                  {f'{_rate("vllm_num_preemptions_total", "model_name", **ENGINES)} '
                   f'or 0 * sum by (model_name) ({_of("vllm_num_requests_running", **ENGINES)})': "{{model_name}}"},
                  "Rising: give decode more KV memory, or raise router.expected_output_tokens."),
        ),
    }),
    Board("prefillshare-router", "prefillshare: router", "pool", {
        "Admission": (
            Panel("Turns waiting", "short", {f'sum by (pool) ({_of("prefillshare_turns_waiting", **POOL)})': "{{pool}}"},
                  "Above zero for long: the pool is at its limit."),
            Panel("Time in the queue", "s", _quantiles("prefillshare_queue_seconds", **POOL),
                  "Near router.max_wait_s, turns are refused."),
            Panel("Turns refused", "reqps",
                  {_rate("prefillshare_turns_refused_total", "pool, reason", **POOL): "{{pool}}: {{reason}}"},
                  "too_late: add replicas; queue_full: raise router.max_queued; never_fits: raise kv_cache_gib."),
        ),
        "Placement": (
            Panel("Calls placed", "reqps",
                  {_rate("prefillshare_placements_total", "pool, reason", **POOL): "{{pool}}: {{reason}}"},
                  "load rising relative to prefix: busy replicas cost cache hits; add replicas, or weigh prefix more."),
            Panel("Prefills", "reqps",
                  {_rate("prefillshare_prefills_total", "pool, where, why", **POOL): "{{pool}}: {{where}}, {{why}}"},
                  "unavailable: look at the prefill pool; objective rising: decode engines are busy, add replicas."),
            Panel("Replicas", "short",
                  {f'max by (pool, state) ({_of("prefillshare_replicas", **POOL)})': "{{pool}}: {{state}}"},
                  "ejected above 0: that replica fails or does not answer; read its log."),
        ),
        "Behind turns": (
            Panel("Failures", "reqps", {_rate("prefillshare_background_failures_total", "task"): "{{task}}"},
                  "Above 0: a defect of prefillshare; turns go on without this work. The router's log has the error and the "
                  "session or request."),
        ),
    }),
    Board("prefillshare-tenants", "prefillshare: tenants", "tenant", {
        "What they use": (
            Panel("Turns", "reqps", {_rate("prefillshare_tenant_turns_total", "tenant", **TENANT): "{{tenant}}"},
                  "Turns admitted. prefillshare usage has the exact figures by day, also after a restart."),
            Panel("Tokens generated and computed", "short",
                  {_rate(USED, "tenant, kind", kind="generated|computed", **TENANT): "{{tenant}}: {{kind}}"},
                  "Per second. This is the engines' work for each tenant."),
            Panel("Prefix-cache hit ratio", "percentunit",
                  {f'{_rate(USED, "tenant", kind="cached", **TENANT)} / '
                   f'{_rate(USED, "tenant", kind="cached|computed", **TENANT)}': "{{tenant}}"},
                  "Share of prompt tokens found cached at prefill. One tenant far below the others: its calls share little; "
                  "look at how it lays out its prompts."),
            Panel("KV held on decode replicas", "bytes",
                  {_rate("prefillshare_tenant_kv_byte_seconds_total", "tenant", **TENANT): "{{tenant}}"},
                  "On average, by the turns in progress; blocks that several turns use count for each of them."),
        ),
        "Limits and the ledger": (
            Panel("Turns refused by tenants' limits", "reqps",
                  {_rate("prefillshare_turns_refused_total", "reason", reason="tenant_limit|.*_per_minute"): "{{reason}}"},
                  "Tenants ask for more than the keys file gives them. The answers say when to try again."),
            Panel("Turns limited by one router alone", "reqps",
                  {_rate("prefillshare_turns_limited_alone_total"): "turns"},
                  "Above 0: Redis does not answer, and tenants may get up to their limits from each router."),
            Panel("Usage not written yet", "s", {"max (prefillshare_usage_unwritten_seconds)": "oldest"},
                  "Above a second: look at Redis. What is not written is lost if the router ends."),
        ),
    }),
    Board("prefillshare-slo", "prefillshare: objectives and alerts", "decoder", {
        "Objectives": (
            Panel("Turns without error", "percentunit",
                  {f'1 - ({_rate("prefillshare_turns_total", outcome="[A-Z].*", **DECODER)} or vector(0)) / '
                   f'{_rate("prefillshare_turns_total", **DECODER)}': "of all turns"},
                  "Turns that clients cancelled do not count as errors. Below the objective: the overview names the errors."),
            Panel("First token within $ttft s", "percentunit", {
                f'{_rate("prefillshare_time_to_first_token_seconds_bucket", "decoder", le="$ttft", **DECODER)} / '
                f'{_rate("prefillshare_time_to_first_token_seconds_count", "decoder", **DECODER)}': "{{decoder}}"
            }, "Share of the turns. Falling: look at queue, prefill and load times for the stage that grows."),
            Panel("Next token within $gap s", "percentunit", {
                f'{_rate("prefillshare_inter_token_seconds_bucket", "decoder", le="$gap", **DECODER)} / '
                f'{_rate("prefillshare_inter_token_seconds_count", "decoder", **DECODER)}': "{{decoder}}"
            }, "Share of the tokens. Falling: decode replicas are busy, or turns are preempted."),
        ),
        "Alerts": (
            Panel("Firing", "short",
                  {f'count by (alertname) ({_of("ALERTS", alertname="PrefillShare.*", alertstate="firing")}) or vector(0)':
                   "{{alertname}}"},
                  "Each alert's runbook says what to do (deploy/prometheus/rules.yaml)."),
            Panel("p95 of a turn, 5 minutes", "s",
                  {"prefillshare:turn_seconds:p95_5m": "{{decoder}}", "prefillshare:turn_seconds:objective": "objective"},
                  "Above the objective for ten minutes: PrefillShareSlowTurns."),
            Panel("p95 of the first token, 5 minutes", "s",
                  {"prefillshare:ttft_seconds:p95_5m": "{{decoder}}", "prefillshare:ttft_seconds:objective": "objective"},
                  "Above the objective for ten minutes: PrefillShareSlowFirstToken."),
        ),
    }, {"ttft": "0.25,0.5,1.0,2.5,5.0,10.0", "gap": "0.025,0.05,0.1,0.25,0.5,1.0"}),
)  # fmt: skip


def built(board: Board) -> dashboard.Dashboard:
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .tags(["prefillshare"])
        .refresh("30s")
        .time("now-1h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable(board.label)
            .datasource(SOURCE)
            .query(f"label_values({_values_of(board.label)}, {board.label})")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    for name, values in board.choices.items():
        shown = values.split(",")[len(values.split(",")) // 2]
        chosen = VariableOption(text=shown, value=shown)
        made = made.with_variable(dashboard.CustomVariable(name).values(values).current(chosen))
    for title, panels in board.rows.items():
        made = made.with_row(dashboard.Row(title))
        for panel in panels:
            made = made.with_panel(_panel(panel))
    return made


def _values_of(label: str) -> str:
    of = {"decoder": "prefillshare_turns_total", "pool": "prefillshare_replicas", "tenant": "prefillshare_tenant_turns_total"}
    return of[label]


def _panel(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.about)
        .unit(panel.unit)
        .min(0)
        .datasource(SOURCE)
        .height(HEIGHT)
        .span(WIDTH)
    )
    for name, (query, legend) in zip(ascii_uppercase, panel.queries.items(), strict=False):
        made = made.with_target(prometheus.Dataquery().ref_id(name).expr(query).legend_format(legend))
    return made


def rendered(board: Board) -> str:
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(built(board).build())), indent=1) + "\n"


def main() -> None:
    for board in BOARDS:
        (HERE / f"{board.uid}.json").write_text(rendered(board))


if __name__ == "__main__":
    main()
