from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from prefillshare.kvshare.errors import ResumeReason
from prefillshare.kvshare.handoff import LEASE_MARGIN_S, TokenChunk
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.usage import TurnUsage
from prefillshare.router.turn.metrics import TurnMetrics


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def counted(registry) -> TurnMetrics:
    return TurnMetrics(Metrics(registry), block_size=4)


@pytest.mark.parametrize(
    ("reason", "lease_left_s", "late"),
    [
        (ResumeReason.KV_LOAD_FAILED, -1.0, 1),
        (ResumeReason.KV_LOAD_FAILED, LEASE_MARGIN_S, 1),
        (ResumeReason.KV_LOAD_FAILED, 5.0, None),
        (ResumeReason.PREEMPTED, -1.0, None),
    ],
)
def test_a_read_is_late_when_its_lease_had_ended(registry, counted, reason, lease_left_s, late):
    counted.resumed("coder", reason, lease_left_s)
    assert registry.get_sample_value("prefillshare_resumes_total", {"decoder": "coder", "reason": reason.value}) == 1
    assert registry.get_sample_value("prefillshare_late_reads_total", {"decoder": "coder"}) == late


def test_times_of_a_turns_tokens(registry, counted):
    usage = TurnUsage()
    for tokens, elapsed_s in ((1, 2.0), (2, 3.0), (0, 3.5), (1, 4.0)):
        counted.generated("coder", usage, TokenChunk(list(range(tokens))), elapsed_s)
    counted.ended("coder", "ok", usage, 4.25)

    def seen(name: str) -> tuple[float, float]:
        return tuple(registry.get_sample_value(f"prefillshare_{name}_{of}", {"decoder": "coder"}) for of in ("count", "sum"))

    assert seen("time_to_first_token_seconds") == (1, 2.0)
    assert seen("inter_token_seconds") == (3, 0.5 + 0.5 + 0.5)
    assert seen("decode_seconds") == (1, 2.0)
    assert seen("turn_seconds") == (1, 4.25)
    assert usage.completion_tokens == 4
