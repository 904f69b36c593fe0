"""docs/metrics.md names every metric there is, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from kvshare.metrics import DEFINITIONS
from prefillshare import metrics_docs

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_page_is_up_to_date():
    assert PAGE.read_text() == metrics_docs.markdown(), "run: python -m prefillshare.metrics_docs > docs/metrics.md"


def test_every_metric_has_a_row_and_says_what_to_do():
    for name, metric in DEFINITIONS.items():
        assert f"| `{name}` (" in metrics_docs.markdown()
        assert metric.help.endswith(".")
        assert metric.when.endswith(".")


def test_names_have_base_units_as_prometheus_wants_them():
    """https://prometheus.io/docs/practices/naming"""
    for name, metric in DEFINITIONS.items():
        assert name.endswith("_total") == (metric.kind.__name__ == "Counter"), name
        assert not name.endswith(("_ms", "_milliseconds", "_mb", "_megabytes", "_percent")), name
