"""Figures are found in Prometheus' text whatever order and labels they come with."""

import pytest

from prefillshare.kvshare.metrics_text import samples, total

TEXT = """\
# HELP turns_total Turns, "quoted" and all
# TYPE turns_total counter
turns_total{decoder="a",outcome="ok"} 3.0
turns_total{decoder="a {odd} \\"name\\"",outcome="ok"} 4.0
turns_total{outcome="cancelled",decoder="a"} 5.0
# TYPE turns_total_seconds histogram
turns_total_seconds_bucket{le="+Inf"} 7.0
turns_total_seconds_sum 0.5
turns_total_seconds_count 7.0
# TYPE vllm:running gauge
vllm:running{engine="0"} 2.0
"""


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("turns_total", {}, 12),
        ("turns_total", {"decoder": "a"}, 8),
        ("turns_total", {"decoder": "a", "outcome": "ok"}, 3),
        ("turns_total", {"decoder": 'a {odd} "name"'}, 4),
        ("turns_total", {"decoder": "b"}, 0),
        ("turns_total_seconds_count", {}, 7),
        ("turns_total_seconds_sum", {}, 0.5),
        ("vllm:running", {}, 2),
        ("turns", {}, 0),
    ],
)
def test_a_total_is_over_all_labels_that_are_not_named(name, labels, expected):
    assert total(TEXT, name, **labels) == expected


def test_samples_have_their_labels():
    assert {sample.labels["outcome"] for sample in samples(TEXT, "turns_total")} == {"ok", "cancelled"}


def test_what_is_no_metrics_text_is_an_error():
    with pytest.raises(ValueError, match="could not convert"):
        total("turns_total{decoder=\n", "turns_total")
