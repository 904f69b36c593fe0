"""docs/metrics.md, made from the definitions: `python -m prefillshare.metrics_docs > docs/metrics.md`."""

from __future__ import annotations

from kvshare.metrics import DEFINITIONS, Metric

_HEAD = """\
# Metrics

<!-- Made by `python -m prefillshare.metrics_docs > docs/metrics.md`; change kvshare/metrics.py instead. -->

`GET /metrics` on the router's HTTP port, in Prometheus' text format; base units. Every router counts the turns that it took
itself: sum over them. Histograms have `_bucket`, `_sum` and `_count`. Labels are bounded: decoders and pools of the deployment,
and the outcomes, reasons and states named below. Alerts: [rules.yaml](../deploy/prometheus/rules.yaml).

| metric | labels | what it is | when it moves |
| --- | --- | --- | --- |
"""


def markdown() -> str:
    return _HEAD + "".join(map(_row, DEFINITIONS.values()))


def _row(metric: Metric) -> str:
    kind = metric.kind.__name__.lower()
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` ({kind}) | {labels} | {metric.help} | {metric.when} |\n"


if __name__ == "__main__":
    print(markdown(), end="")
