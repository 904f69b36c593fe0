"""How many series a router's /metrics has at most (docs/metrics.md), by what is deployed."""

from __future__ import annotations

from dataclasses import dataclass

from prefillshare.kvshare import errors
from prefillshare.kvshare.metrics import DEFINITIONS, Metric
from prefillshare.kvshare.other_metrics import ENGINE_METRICS, ROUTER_METRICS

#: Series of each of an engine's histograms with buckets: vLLM chooses the buckets.
_OF_A_HISTOGRAM = 24
#: Routes times classes of HTTP status.
_REQUESTS = 24 * 5
_ERRORS = {
    name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, errors.PrefillShareError)
}


@dataclass(frozen=True)
class Series:
    """`own_layers`: besides, for a decoder that computes layers of a prompt itself, and one more for each of its groups.
    `tenant`: for each tenant, up to a hundred of them; `tenant_decoder`: for each decoder that the tenant has used."""

    decoder: int
    own_layers: int
    pool: int
    tenant: int
    tenant_decoder: int
    engine: int
    router: int

    @classmethod
    def most(cls) -> Series:
        ours = dict.fromkeys(("decoder", "own_layers", "pool", "tenant", "tenant_decoder", "router"), 0)
        for metric in DEFINITIONS.values():
            ours[_of(metric)] += metric.series * _combinations(metric)
        of_engines = sum(_OF_A_HISTOGRAM if metric.buckets else len(metric.series) for metric in ENGINE_METRICS.values())
        others = sum(_REQUESTS if metric.labels else 1 for metric in ROUTER_METRICS.values())
        return cls(**ours | {"router": ours["router"] + others}, engine=of_engines)


def _of(metric: Metric) -> str:
    """The field of Series that it counts into."""
    if metric.own_layers:
        return "own_layers"
    named = [label for label in ("tenant", "decoder", "pool") if label in metric.labels]
    return "_".join(named) or "router"


def _combinations(metric: Metric) -> int:
    """Of the values of its labels beside tenant, decoder or pool."""
    known = set(metric.known)
    if {"ok", "cancelled"} <= known:  # or an error's name
        known |= _ERRORS
    return max(1, len(known))
