"""What a decoder's own end of the prompt costs in time to first token, in a deployment of two engines and in one of one engine.

    python -m benchmarks.own_end [--repeats 6] [--context 512]

Decoders that compute the last 1, 32 and 64 tokens of each prompt themselves stand in one pool and take turns. A session's first
turn brings its context to the engines, and its second one has the new tokens and is measured. The last line is JSON: new tokens
-> median seconds by own tokens, and all of them relative to 1.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.first_token import ONE_ENGINE, deployment, second_turns
from benchmarks.shared.result import write
from benchmarks.shared.small import ADDRESS, DECODERS, MODEL, bars
from prefillshare.app import running
from prefillshare.client import Client
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters

#: Decoder -> the tokens that it computes itself.
OWN = dict(zip(DECODERS, (1, 32, 64), strict=True))
GIVEN = (32, 64, 128)
TWO_ENGINES = "two engines"
#: Deployment -> its policy (local_prefill).
DEPLOYMENTS = {TWO_ENGINES: "auto", ONE_ENGINE: ONE_ENGINE}


def medians(turns: list[dict]) -> dict[int, float]:
    """Own tokens -> seconds."""
    waited = {own: [turn["ttft_s"] for turn in turns if turn["decoder"] == name] for name, own in OWN.items()}
    return {own: round(statistics.median(of), 4) for own, of in waited.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=6, help="turns per decoder and number of new tokens")
    parser.add_argument("--context", type=int, default=512, help="tokens of a session before the measured turn")
    args = parser.parse_args()
    console, names = Console(stderr=True), DECODERS * args.repeats
    figures: dict[str, dict[int, list[dict]]] = {}
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress:
        model = fetch(MODEL)
        adapters = make_seeded_adapters(model, Path(folder), names=DECODERS, own_tokens=OWN)
        for engines, policy in DEPLOYMENTS.items():
            with running(deployment(model, adapters, policy)), Client(ADDRESS, retries=None) as client:
                task, rng = progress.add_task(engines, total=(1 + len(GIVEN)) * len(names)), random.Random(engines)
                for given in (GIVEN[0], *GIVEN):  # the first is a warm-up, in which the router measures what things cost
                    turns = second_turns(client, names, given, args.context, rng, partial(progress.advance, task))
                    figures.setdefault(engines, {})[given] = turns
    seconds = {engines: {given: medians(turns) for given, turns in of.items()} for engines, of in figures.items()}
    relative = {
        engines: {given: {own: round(s / by_own[1], 3) for own, s in by_own.items() if own > 1} for given, by_own in of.items()}
        for engines, of in seconds.items()
    }
    write("own_end", console, vars(args), {"ttft_s": seconds, "to_one_own_token": relative}, turns=figures)


if __name__ == "__main__":
    main()
