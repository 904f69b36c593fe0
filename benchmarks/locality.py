"""How much of a prompt is found cached when sessions switch models: policies side by side, against the best possible.

    python -m benchmarks.locality [--sessions 24] [--turns 4] [--policies prefix_aware,session_sticky,round_robin]

Two prefill replicas, and three decoders on one decode replica. Sessions take turns in an interleaved order, every turn with
another decoder; groups of sessions share a beginning. All policies get traces of the same shape, with different tokens, on
the same engines. The best possible is what one unbounded cache would have found, given the order in which turns began: at
most every full block of every prompt that an earlier prompt had computed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks.shared import small
from benchmarks.shared.result import write
from benchmarks.shared.small import ADDRESS, BLOCK, DECODERS, MODEL, VOCABULARY, bars
from prefillshare.app import running
from prefillshare.apply import apply
from prefillshare.client import Client
from prefillshare.kvshare.config import Deployment
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters

#: Sessions that share a beginning; in tokens: its length, and the ranges of what a turn appends and generates.
GROUP, BEGINNING, INPUT, OUTPUT = 6, 128, (48, 96), (12, 20)


@dataclass
class Trace:
    """Turns in the order in which they begin. `prompts`, filled while it runs: the prompts given to prefill, in that order."""

    sessions: int
    turns: int
    seed: int
    order: list[tuple[int, int]] = field(default_factory=list)
    prompts: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rng, shape = random.Random(self.seed), random.Random(0)
        for turn in range(self.turns):
            numbers = list(range(self.sessions))
            shape.shuffle(numbers)
            self.order += [(session, turn) for session in numbers]
        self.beginnings = [self._tokens(BEGINNING) for _ in range(-(-self.sessions // GROUP))]
        self.inputs = {turn: self._tokens(shape.randint(*INPUT)) for turn in self.order}
        self.outputs = {turn: shape.randint(*OUTPUT) for turn in self.order}

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(VOCABULARY) for _ in range(count)]


def best_possible(trace: Trace) -> float:
    """Hit ratio of one unbounded cache."""
    computed, found, asked = set(), 0, 0
    for turn in trace.order:
        prompt = trace.prompts[turn][:-1]  # the last prompt token is the decoder's own
        asked += len(prompt)
        blocks = [hash(tuple(prompt[: end + BLOCK])) for end in range(0, len(prompt) - BLOCK + 1, BLOCK)]
        hits = next((n for n, block in enumerate(blocks) if block not in computed), len(blocks))
        found += min(hits * BLOCK, (len(prompt) - 1) // BLOCK * BLOCK)
        computed.update(blocks)
    return found / asked


def play(trace: Trace, client: Client, at_once: int, advance) -> dict[str, float]:
    """Run a trace with `at_once` turns at a time; turns of one session run one after the other."""
    lock, usages = threading.Lock(), []
    sessions = [client.create_session(token_ids=trace.beginnings[s // GROUP]) for s in range(trace.sessions)]

    def take(turn: tuple[int, int]) -> None:
        number, count = turn
        context = list(sessions[number].get(with_token_ids=True).token_ids)
        trace.prompts[turn] = context + trace.inputs[turn]
        result = sessions[number].turn(
            DECODERS[(number + count) % len(DECODERS)],
            token_ids=trace.inputs[turn],
            max_tokens=trace.outputs[turn],
            ignore_eos=True,
        )
        with lock:
            usages.append(result.usage)
        advance()

    began = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        for first in range(0, len(trace.order), trace.sessions):  # a session's next turn begins when its last has ended
            for waiting in [pool.submit(take, turn) for turn in trace.order[first : first + trace.sessions]]:
                waiting.result()
    for session in sessions:
        session.delete()
    prompt, cached = sum(u.prompt_tokens - 1 for u in usages), sum(u.cached_tokens for u in usages)
    waits = sorted(u.time_to_first_token_s for u in usages)
    return {
        "hit_ratio": round(cached / prompt, 4),
        "best_possible": round(best_possible(trace), 4),
        "predicted_ratio": round(sum(u.predicted_tokens for u in usages) / prompt, 4),
        "mean_prediction_error_tokens": round(sum(abs(u.predicted_tokens - u.cached_tokens) for u in usages) / len(usages), 2),
        "ttft_p50_s": round(waits[len(waits) // 2], 3),
        "ttft_p95_s": round(waits[int(len(waits) * 0.95)], 3),
        "elapsed_s": round(time.monotonic() - began, 1),
        "replicas_used": len({u.prefill_replica for u in usages}),
    }


def deployment(model: Path, adapters: dict[str, Path], kv_cache_gib: float, policy: str) -> Deployment:
    router = {"placement": {"policy": policy}, "eager_prefill": False}
    prefill = {"replicas": 2, "kv_cache_gib": kv_cache_gib}
    return small.deployment(model, adapters, prefill=prefill, decode={"kv_cache_gib": 0.5}, router=router)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sessions", type=int, default=24, help="interleaved sessions (default: 24)")
    parser.add_argument("--turns", type=int, default=4, help="turns per session (default: 4)")
    parser.add_argument("--at-once", type=int, default=6, help="turns at a time (default: 6)")
    parser.add_argument("--kv-cache-gib", type=float, default=0.4, help="KV cache per prefill replica (default: 0.4)")
    parser.add_argument("--policies", default="prefix_aware,session_sticky,round_robin", help="policies to compare")
    args = parser.parse_args()
    console, policies = Console(stderr=True), args.policies.split(",")
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress:
        model = fetch(MODEL)
        adapters = make_seeded_adapters(model, Path(folder), names=DECODERS)
        start = progress.add_task("starting engines", total=None)
        figures = {}
        with running(deployment(model, adapters, args.kv_cache_gib, policies[0])), Client(ADDRESS, retries=None) as client:
            progress.remove_task(start)
            for number, policy in enumerate(policies):
                apply(deployment(model, adapters, args.kv_cache_gib, policy))
                task = progress.add_task(policy, total=args.sessions * args.turns)
                trace = Trace(args.sessions, args.turns, seed=1000 + number)
                figures[policy] = play(trace, client, args.at_once, lambda task=task: progress.advance(task))
                console.print(f"{policy}: {figures[policy]}")
    headline = {k: figures[policies[0]][k] for k in ("hit_ratio", "best_possible")}
    headline |= {f"{policy}_hit_ratio": figures[policy]["hit_ratio"] for policy in policies[1:]}
    write("locality", console, vars(args), headline, policies=figures)


if __name__ == "__main__":
    main()
