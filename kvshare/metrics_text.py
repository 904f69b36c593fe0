"""Reads metrics in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def families(text: str) -> Iterator[Metric]:
    """Raises ValueError if `text` is not in that format."""
    return text_string_to_metric_families(text)


def samples(text: str, name: str, **labels: str) -> list[Sample]:
    """The samples of this name (a histogram's with their suffix) that have at least these labels."""
    return [
        sample
        for family in families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def total(text: str, name: str, **labels: str) -> float:
    """The sum of the same samples; 0.0 if there are none."""
    return sum(sample.value for sample in samples(text, name, **labels))
