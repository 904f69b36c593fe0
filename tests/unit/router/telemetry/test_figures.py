"""What a router tells operators of itself adds up to what it has counted."""

from prometheus_client import CollectorRegistry

from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.telemetry.figures import figures


def test_turns_and_tokens_are_told_by_decoder_and_what_is_under_way_altogether():
    metrics = Metrics(CollectorRegistry())
    metrics.expect(["planner", "coder"], ["agents", "drift"])
    metrics["turns_total"].labels("planner", "ok").inc(3)
    metrics["turns_total"].labels("planner", "cancelled").inc(2)
    metrics["turns_total"].labels("planner", "Overloaded").inc()
    metrics["prefill_tokens_total"].labels("planner", "cached").inc(64)
    metrics["prefill_tokens_total"].labels("planner", "computed").inc(36)
    metrics["sessions"].set(7)
    metrics["turns_in_progress"].set(4)
    metrics["turns_waiting"].labels("agents").set(1)
    metrics["turns_waiting"].labels("drift").set(2)
    assert figures(metrics) == {
        "sessions": 7,
        "turns_in_progress": 4,
        "turns_waiting": 3,
        "decoders": {
            "planner": {"turns": 6, "failed": 1, "cached": 64, "computed": 36},
            "coder": {"turns": 0, "failed": 0, "cached": 0, "computed": 0},
        },
    }
