"""What a router has counted since it was started, as plain data for operators (`prefillshare status`)."""

from __future__ import annotations

from collections import defaultdict

from prefillshare.kvshare.metrics import Metrics

#: Outcomes of turns that are no errors.
_NO_ERROR = ("ok", "cancelled")


def figures(metrics: Metrics) -> dict[str, object]:
    """`decoders`: by name, how many turns have ended, how many of them with an error, and prompt tokens at prefill."""
    decoders: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(("turns", "failed", "cached", "computed"), 0))
    for labels, value in _values(metrics, "turns_total"):
        one = decoders[labels["decoder"]]
        one["turns"] += value
        one["failed"] += 0 if labels["outcome"] in _NO_ERROR else value
    for labels, value in _values(metrics, "prefill_tokens_total"):
        decoders[labels["decoder"]][labels["source"]] += value
    return {
        "sessions": _sum(metrics, "sessions"),
        "turns_in_progress": _sum(metrics, "turns_in_progress"),
        "turns_waiting": _sum(metrics, "turns_waiting"),
        "decoders": dict(decoders),
    }


def _sum(metrics: Metrics, name: str) -> int:
    return sum(value for _, value in _values(metrics, name))


def _values(metrics: Metrics, name: str) -> list[tuple[dict[str, str], int]]:
    """(labels, value) of a counter's or gauge's series."""
    return [
        (sample.labels, round(sample.value))
        for family in metrics[name].collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
