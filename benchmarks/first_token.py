"""How long a turn with few new tokens waits for its first token: the prefill pool makes their KV, the decode engine makes it
itself, or the router decides; and the same in a deployment of one engine.

    python -m benchmarks.first_token [--repeats 6] [--context 512]

Two deployments with the same cores. The first has a prefill and a decode engine with a core each, and its policy
(local_prefill) is changed while it runs; the second has one engine with both cores. Turns run one after the other: a session's
first turn brings its context to the engines, and its second one has the new tokens and is measured. The last line is JSON: new
tokens -> median seconds by policy, and all of them relative to `never`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from pathlib import Path

from rich.console import Console

from benchmarks.shared import small
from benchmarks.shared.result import write
from benchmarks.shared.small import ADDRESS, DECODERS, MODEL, VOCABULARY, bars
from prefillshare.app import running
from prefillshare.apply import apply
from prefillshare.client import Client
from prefillshare.kvshare.config import Deployment
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters

GIVEN = (32, 64, 128, 256)
POLICIES, ONE_ENGINE = ("never", "always", "auto"), "one engine"
#: Seconds after a session's first turn, in which its response is prefilled and the router is told what is cached.
PAUSE_S = 0.5


def second_turns(
    client: Client, names: Iterable[str], given: int, context: int, rng: random.Random, advance: Callable[[], None]
) -> list[dict]:
    """What is measured of second turns with `given` new tokens, one of each of the named decoders: TTFT, and where the KV came
    from."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    found = []
    for name in names:
        session = client.create_session()
        session.turn(name, token_ids=tokens(context), max_tokens=4, ignore_eos=True)
        time.sleep(PAUSE_S)
        usage = session.turn(name, token_ids=tokens(given), max_tokens=4, ignore_eos=True).usage
        found.append({"decoder": name, "ttft_s": usage.time_to_first_token_s, "choice": usage.prefill_choice})
        session.delete()
        advance()
    return found


def deployment(model: Path, adapters: dict[str, Path], policy: str) -> Deployment:
    if policy == ONE_ENGINE:
        alone = {"kv_cache_gib": 1.0, "cpu_cores": "0-1", "local_prefill": None}
        return small.deployment(model, adapters, prefill={"replicas": 0}, decode=alone, router={})
    size = {"kv_cache_gib": 0.5}
    return small.deployment(model, adapters, prefill=size, decode={**size, "local_prefill": policy}, router={})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=6, help="turns per number of new tokens and policy")
    parser.add_argument("--context", type=int, default=512, help="tokens of a session before the measured turn")
    args = parser.parse_args()
    console, figures = Console(stderr=True), {}
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress:
        model = fetch(MODEL)
        adapters = make_seeded_adapters(model, Path(folder), names=DECODERS)

        def measure(policy: str, client: Client) -> None:
            task = progress.add_task(policy, total=(1 + len(GIVEN)) * args.repeats)
            rng, names = random.Random(policy), list(islice(cycle(DECODERS), args.repeats))
            for given in (GIVEN[0], *GIVEN):  # the first is a warm-up, in which the router measures what things cost
                turns = second_turns(client, names, given, args.context, rng, lambda: progress.advance(task))
                figures.setdefault(str(given), {})[policy] = turns

        with running(deployment(model, adapters, POLICIES[0])), Client(ADDRESS, retries=None) as client:
            for policy in POLICIES:
                apply(deployment(model, adapters, policy))
                measure(policy, client)
        with running(deployment(model, adapters, ONE_ENGINE)), Client(ADDRESS, retries=None) as client:
            measure(ONE_ENGINE, client)
    medians = {
        given: {policy: round(statistics.median(turn["ttft_s"] for turn in turns), 4) for policy, turns in of.items()}
        for given, of in figures.items()
    }
    relative = {
        policy: {given: round(of[policy] / of["never"], 3) for given, of in medians.items()}
        for policy in (*POLICIES[1:], ONE_ENGINE)
    }
    write("first_token", console, vars(args), {"ttft_s": medians, "to_never": relative}, turns=figures)


if __name__ == "__main__":
    main()
