"""Sessions whose turns go round several decoders, and what they cost; for benchmarks that compare sharing modes."""

from __future__ import annotations

import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

from benchmarks.shared.load import quantile
from benchmarks.shared.small import VOCABULARY
from prefillshare.client import Client, collect


class Lengths(NamedTuple):
    """Numbers of tokens: of a session before its first turn, given with each turn, and generated in each turn."""

    beginning: int
    given: int
    answer: int


def play(
    client: Client, names: list[str], turns: int, sessions: int, at_once: int, lengths: Lengths, *, seed: int, advance
) -> dict[str, float]:
    """`sessions` sessions of `turns` turns, `at_once` at a time; their turns go round the decoders. Times are the client's."""

    def take(number: int) -> list[tuple[float, float, int, int]]:
        rng = random.Random(f"{seed} {number}")
        session = client.create_session(token_ids=[rng.randrange(VOCABULARY) for _ in range(lengths.beginning)])
        taken = []
        for turn in range(turns):
            given = [rng.randrange(VOCABULARY) for _ in range(lengths.given)]
            arrived, started = [], time.monotonic()
            name = names[(number + turn) % len(names)]
            pieces = session.stream(name, token_ids=given, max_tokens=lengths.answer, ignore_eos=True, temperature=0.0)
            computed = collect(pieces, lambda _, to=arrived: to.append(time.monotonic())).usage.computed_tokens
            again = max(0, computed - lengths.given - (0 if turn else lengths.beginning))
            taken.append((arrived[-1] - started, arrived[0] - started, computed, again))
            advance()
        session.delete()
        return taken

    began = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        taken = list(chain.from_iterable(pool.map(take, range(sessions))))
    elapsed = time.monotonic() - began
    turn_s, ttft_s, computed, again = zip(*taken, strict=True)
    return {
        "turns": len(taken),
        "turns_per_s": round(len(taken) / elapsed, 4),
        "turn_p50_s": round(quantile(turn_s, 0.5), 3),
        "turn_p95_s": round(quantile(turn_s, 0.95), 3),
        "ttft_p50_s": round(quantile(ttft_s, 0.5), 3),
        "ttft_p95_s": round(quantile(ttft_s, 0.95), 3),
        "computed_tokens_per_turn": round(statistics.mean(computed), 1),
        "computed_again_per_turn": round(statistics.mean(again), 1),
        "computed_again_most": max(again),
    }
