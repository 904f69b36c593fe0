"""Metrics by tenant. How many tenants have series of their own is bounded."""

from __future__ import annotations

from functools import lru_cache

from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.accounts.figures import Figures

#: Tenants with series of their own: the first ones that use anything. The others share a series.
MOST_TENANTS = 100
#: Labels that no tenant can have as its name: of the others, and of the anonymous tenant.
OTHERS, ANONYMOUS = "(others)", "(anonymous)"
_TOKENS = {
    "prompt": Figures._fields.index("prompt_tokens"),
    "cached": Figures._fields.index("cached_tokens"),
    "computed": Figures._fields.index("computed_tokens"),
    "generated": Figures._fields.index("generated_tokens"),
}


class TenantMetrics:
    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._labels: dict[str, str] = {}
        self._series = lru_cache(4096)(self._find)

    def used(self, tenant: str, decoder: str, new: Figures) -> None:
        tokens, turns, kv = self._series(self._label(tenant), decoder)
        for series, place in tokens:
            if new[place]:
                series.inc(new[place])
        if new.turns:
            turns.inc(new.turns)
        if new.kv_byte_seconds:
            kv.inc(new.kv_byte_seconds)

    def _label(self, tenant: str) -> str:
        if tenant not in self._labels and len(self._labels) < MOST_TENANTS:
            self._labels[tenant] = tenant or ANONYMOUS
        return self._labels.get(tenant, OTHERS)

    def _find(self, label: str, decoder: str):
        m = self._metrics
        tokens = [(m["tenant_tokens_total"].labels(label, decoder, kind), place) for kind, place in _TOKENS.items()]
        of = (label, decoder)
        return tokens, m["tenant_turns_total"].labels(*of), m["tenant_kv_byte_seconds_total"].labels(*of)
