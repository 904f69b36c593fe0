"""Metrics of turns, per decoder and pool. They are defined in kvshare/metrics.py."""

from __future__ import annotations

from prefillshare.kvshare.errors import ResumeReason
from prefillshare.kvshare.handoff import LEASE_MARGIN_S, TokenChunk
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.usage import TurnUsage
from prefillshare.router.pools.cache_index import BlockKeys
from prefillshare.router.turn.sharing_credit import SharingCredit


class TurnMetrics:
    def __init__(self, metrics: Metrics, block_size: int):
        self._metrics, self._credit = metrics, SharingCredit(block_size)

    def placed(self, pool: str, reason: str) -> None:
        self._metrics["placements_total"].labels(pool, reason).inc()

    def decided(self, pool: str, where: str, why: str) -> None:
        self._metrics["prefills_total"].labels(pool, where, why).inc()

    def prefilled(self, decoder: str, elapsed_s: float) -> None:
        self._metrics["prefill_seconds"].labels(decoder).observe(elapsed_s)

    def found_cached(self, pool: str, predicted: int, cached_tokens: int) -> None:
        """For a turn's first prefill only: a later one finds what the turn has put there itself."""
        self._metrics["predicted_cached_tokens_total"].labels(pool).inc(predicted)
        self._metrics["actual_cached_tokens_total"].labels(pool).inc(cached_tokens)
        self._metrics["prediction_error_tokens"].labels(pool).observe(abs(predicted - cached_tokens))

    def asked_of_shared(self, decoder: str, keys: BlockKeys, cached_tokens: int) -> None:
        """For prompts that are prefilled in the pool which all decoders share."""
        if saved := self._credit.ask(keys, decoder, cached_tokens):
            self._metrics["prefill_tokens_saved_total"].labels(decoder).inc(saved)
            self._metrics["cross_model_hits_total"].labels(decoder).inc()

    def own_layers(self, decoder: str, group: LayerGroup | None) -> None:
        self._metrics["own_layer_turns_total"].labels(decoder, str(group or "none")).inc()

    def kv_loaded(self, decoder: str, load_s: float, lease_left_s: float) -> None:
        self._metrics["kv_load_seconds"].labels(decoder).observe(load_s)
        self._metrics["lease_margin_seconds"].labels(decoder).observe(max(0.0, lease_left_s))

    def resumed(self, decoder: str, reason: ResumeReason, lease_left_s: float) -> None:
        """`lease_left_s`: what was left of the lease on the turn's prefix when its KV was given up."""
        self._metrics["resumes_total"].labels(decoder, reason.value).inc()
        if reason is ResumeReason.KV_LOAD_FAILED and lease_left_s <= LEASE_MARGIN_S:
            self._metrics["late_reads_total"].labels(decoder).inc()

    def generated(self, decoder: str, usage: TurnUsage, chunk: TokenChunk, elapsed_s: float) -> None:
        """Count new tokens, `elapsed_s` seconds after the turn's arrival, and update its usage."""
        tokens = len(chunk.token_ids)
        if tokens and not usage.completion_tokens:
            usage.ttft_s = elapsed_s
            self._metrics["time_to_first_token_seconds"].labels(decoder).observe(elapsed_s)
        else:
            between = self._metrics["inter_token_seconds"].labels(decoder)
            for _ in range(tokens):
                between.observe((elapsed_s - usage.total_s) / tokens)
        usage.completion_tokens += tokens
        usage.total_s = elapsed_s

    def ended(self, decoder: str, outcome: str, usage: TurnUsage, elapsed_s: float) -> None:
        m = self._metrics
        m["turns_total"].labels(decoder, outcome).inc()
        m["turn_seconds"].labels(decoder).observe(elapsed_s)
        if usage.completion_tokens:
            m["decode_seconds"].labels(decoder).observe(usage.total_s - usage.ttft_s)
        m["prefill_tokens_total"].labels(decoder, "cached").inc(usage.cached_tokens)
        m["prefill_tokens_total"].labels(decoder, "computed").inc(usage.computed_tokens)
        m["completion_tokens_total"].labels(decoder).inc(usage.completion_tokens)
        m["kv_transfer_bytes_total"].labels(decoder).inc(usage.kv_bytes)
