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
_ERRORS = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.PrefillShareError)]


@dataclass(frozen=True)
class Series:
    """`own_layers`: besides, for a decoder that computes layers of a prompt itself, and one more for each of its groups."""

    decoder: int
    own_layers: int
    pool: int
    engine: int
    router: int

    @classmethod
    def most(cls) -> Series:
        ours = {"decoder": 0, "own_layers": 0, "pool": 0, "router": 0}
        for metric in DEFINITIONS.values():
            of = next((label for label in ("decoder", "pool") if label in metric.labels), "router")
            ours["own_layers" if metric.own_layers else of] += metric.series * _combinations(metric)
        of_engines = sum(_OF_A_HISTOGRAM if metric.buckets else len(metric.series) for metric in ENGINE_METRICS.values())
        others = sum(_REQUESTS if metric.labels else 1 for metric in ROUTER_METRICS.values())
        return cls(**ours | {"router": ours["router"] + others}, engine=of_engines)


def _combinations(metric: Metric) -> int:
    """Of the values of its labels beside decoder or pool."""
    if {"ok", "cancelled"} <= set(metric.known):  # or an error's name
        return 2 + len(_ERRORS)
    return max(1, len(metric.known))
