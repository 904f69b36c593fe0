"""How a tenant stands against its limits, as clients read it."""

import asyncio
from datetime import UTC, datetime

import pytest

from prefillshare.kvshare import rate_limits
from prefillshare.kvshare.rate_limits import REQUESTS, TOKENS, Allowance

STANDING = (Allowance(REQUESTS, 60, 59, 1.0), Allowance(TOKENS, 150_000, 149_984, 0.0061))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.0061, "7ms"), (0.02, "20ms"), (0.999, "999ms"), (1, "1s"), (8.64, "8.64s"), (60, "1m0s"), (360, "6m0s"),
        (61.5, "1m1.5s"), (3605, "1h0m5s"), (90_000, "25h0m0s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert rate_limits.duration(seconds) == text


def test_headers_are_openais_and_anthropics():
    assert rate_limits.headers(STANDING) == [
        ("x-ratelimit-limit-requests", "60"),
        ("x-ratelimit-remaining-requests", "59"),
        ("x-ratelimit-reset-requests", "1s"),
        ("x-ratelimit-limit-tokens", "150000"),
        ("x-ratelimit-remaining-tokens", "149984"),
        ("x-ratelimit-reset-tokens", "7ms"),
    ]
    now = datetime(2026, 12, 31, 23, 59, 59, 400_000, UTC)
    assert dict(rate_limits.anthropic_headers(STANDING, now)) == {
        "anthropic-ratelimit-requests-limit": "60",
        "anthropic-ratelimit-requests-remaining": "59",
        "anthropic-ratelimit-requests-reset": "2027-01-01T00:00:00Z",
        "anthropic-ratelimit-tokens-limit": "150000",
        "anthropic-ratelimit-tokens-remaining": "149984",
        "anthropic-ratelimit-tokens-reset": "2026-12-31T23:59:59Z",
    }


async def test_of_several_turns_the_one_that_leaves_least_is_told_whichever_task_notes_it():
    async def turn(remaining: int) -> None:
        rate_limits.note((Allowance(TOKENS, 100, remaining, 1.0),))

    async def call(*remaining: int) -> list[tuple[str, str]]:
        rate_limits.listen()
        await asyncio.gather(*(asyncio.create_task(turn(left)) for left in remaining))
        return rate_limits.headers_now()

    told = await asyncio.gather(*(asyncio.create_task(call(*lefts)) for lefts in ((70, 40, 55), (90,), ())))
    assert [dict(one).get("x-ratelimit-remaining-tokens") for one in told] == ["40", "90", None]


def test_outside_a_call_there_is_nobody_to_tell():
    rate_limits.note(STANDING)
    assert rate_limits.headers_now() == []
