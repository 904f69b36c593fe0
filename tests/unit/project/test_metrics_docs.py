"""docs/metrics.md names every metric there is, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry

from prefillshare import metrics_docs
from prefillshare.kvshare.metrics import DEFINITIONS, Metrics
from prefillshare.kvshare.other_metrics import ENGINE_METRICS, ROUTER_METRICS, Kind

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_page_is_up_to_date():
    assert PAGE.read_text() == metrics_docs.markdown(), "run: python -m prefillshare.metrics_docs > docs/metrics.md"


def test_what_other_programs_export_has_a_row_and_says_what_to_do():
    for metric in (*ENGINE_METRICS.values(), *ROUTER_METRICS.values()):
        assert f"| `{metric.name}` ({metric.kind})" in metrics_docs.markdown()
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert metric.help.endswith(".")
        assert metric.when.endswith(".")


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


def test_what_will_be_counted_is_exported_from_the_start():
    registry = CollectorRegistry()
    Metrics(registry).expect(["planner", "coder"], ["agents", "prefill"])
    there = {(s.name, *sorted(s.labels.items())) for family in registry.collect() for s in family.samples}
    assert ("prefillshare_resumes_total", ("decoder", "coder"), ("reason", "gone")) in there
    assert ("prefillshare_placements_total", ("pool", "prefill"), ("reason", "load")) in there
    assert ("prefillshare_prefills_total", ("pool", "agents"), ("where", "here"), ("why", "unavailable")) in there
    assert ("prefillshare_turn_seconds_count", ("decoder", "planner")) in there
    assert not any(name.startswith("prefillshare_own_layer_turns") for name, *_ in there)  # which layers is not known yet


def test_what_only_decoders_with_own_layers_have_is_exported_for_them_only():
    registry = CollectorRegistry()
    Metrics(registry).expect(["planner", "coder"], ["agents"], own_layers=["coder"])
    of = {s.labels["decoder"] for family in registry.collect() for s in family.samples if "canary" in s.name}
    assert of == {"coder"}


def test_nothing_is_exported_of_what_is_gone():
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.expect(["planner", "coder"], ["agents", "old"], ["planner"])
    metrics["kv_blocks"].labels("old", "used").set_function(lambda: 1)
    metrics.forget(decoders=["planner"], pools=["old"])
    left = [label for family in registry.collect() for s in family.samples for label in s.labels.values()]
    assert {"coder", "agents"} <= set(left)
    assert {"planner", "old"} & set(left) == set()


def test_what_is_exported_from_the_start_is_what_the_help_names():
    for name, metric in DEFINITIONS.items():
        if metric.known and name != "prefillshare_turns_total":
            known = {value for one in metric.known for value in ([one] if isinstance(one, str) else one)}
            assert all(value in metric.help for value in known), name
