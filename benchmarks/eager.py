"""What eager prefill takes off the next turn's time to first token.

    python -m benchmarks.eager [--sessions 3] [--turns 4]

The same sessions, one after the other, with and without eager prefill, on the same kind of deployment: turns have long
responses and short inputs, and pauses between them as while an agent's tool runs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks.shared import small
from benchmarks.shared.result import write
from benchmarks.shared.small import ADDRESS, DECODERS, MODEL, VOCABULARY, bars
from prefillshare.app import running
from prefillshare.client import Client
from prefillshare.kvshare.config import Deployment
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters

INPUT, OUTPUT = 24, 64


def play(client: Client, sessions: int, turns: int, pause_s: float, advance) -> dict[str, float]:
    """First turns are not counted: there is no earlier response that could have been prefilled eagerly."""
    rng, waited, computed = random.Random(5), [], []
    for _ in range(sessions):
        session = client.create_session()
        for number in range(turns):
            given = [rng.randrange(VOCABULARY) for _ in range(INPUT)]
            result = session.turn(DECODERS[number % 3], token_ids=given, max_tokens=OUTPUT, ignore_eos=True)
            if number:
                waited.append(result.usage.time_to_first_token_s)
                computed.append(result.usage.computed_tokens)
            advance()
            time.sleep(pause_s)
        session.delete()
    waited.sort()
    return {
        "ttft_p50_s": round(statistics.median(waited), 4),
        "ttft_p95_s": round(waited[int(len(waited) * 0.95)], 4),
        "computed_tokens_per_turn": round(statistics.mean(computed), 1),
    }


def deployment(model: Path, adapters: dict[str, Path], eager: bool) -> Deployment:
    sizes = {"kv_cache_gib": 0.5}
    return small.deployment(model, adapters, prefill=sizes, decode=sizes, router={"eager_prefill": eager})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sessions", type=int, default=3, help="sessions (default: 3)")
    parser.add_argument("--turns", type=int, default=4, help="turns per session (default: 4)")
    parser.add_argument("--pause-s", type=float, default=0.5, help="pause between turns, seconds (default: 0.5)")
    args = parser.parse_args()
    console, figures = Console(stderr=True), {}
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress:
        model = fetch(MODEL)
        adapters = make_seeded_adapters(model, Path(folder), names=DECODERS)
        for name, eager in (("without", False), ("with", True)):
            task = progress.add_task(f"{name} eager prefill", total=args.sessions * args.turns)
            with running(deployment(model, adapters, eager)), Client(ADDRESS, retries=None) as client:
                figures[name] = play(client, args.sessions, args.turns, args.pause_s, lambda task=task: progress.advance(task))
            console.print(f"{name}: {figures[name]}")
    headline = {
        "ttft_ratio": round(figures["with"]["ttft_p50_s"] / figures["without"]["ttft_p50_s"], 3),
        "ttft_p50_s_with": figures["with"]["ttft_p50_s"],
        "ttft_p50_s_without": figures["without"]["ttft_p50_s"],
        "computed_tokens_with": figures["with"]["computed_tokens_per_turn"],
        "computed_tokens_without": figures["without"]["computed_tokens_per_turn"],
    }
    write("eager", console, vars(args), headline, runs=figures)


if __name__ == "__main__":
    main()
