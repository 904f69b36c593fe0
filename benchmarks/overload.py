"""Does goodput hold when twice as much is asked as can be served?

    python -m benchmarks.overload [--seconds 120]

One prefill and one decode replica with little KV memory. Turns arrive as a Poisson process (open loop), each in a session of
its own with a beginning that its group shares. Short runs at rising rates, starting from what a few clients get in a closed
loop, find the knee: the highest rate at which 95 of 100 turns are good. Then the knee and twice the knee are measured
alternately, two runs each, and their means are compared. A turn is good if it ended without an error and its first token came
within the objective; goodput is the rate of good turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.shared import small
from benchmarks.shared.result import write
from benchmarks.shared.small import ADDRESS, DECODERS, MODEL, VOCABULARY
from prefillshare.app import running
from prefillshare.client import Client
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.errors import Overloaded, PrefillShareError
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters

GROUPS, BEGINNING, INPUT, OUTPUT = 8, 192, (32, 160), (16, 48)
#: Factor from one rate to the next; most rates tried; share of good turns up to the knee; runs of each rate at the end.
STEP, MOST_RATES, GOOD_SHARE, REPEATS = 1.2, 8, 0.95, 2
#: Turns at once of the closed loop, few enough that none is refused; most clients of the open loop.
AT_ONCE, MOST_CLIENTS = 6, 256


class Load:
    """Turns made from a seed: the same ones at every rate."""

    def __init__(self, client: Client, objective_s: float):
        self._client, self.objective_s = client, objective_s
        rng = random.Random(7)
        self._beginnings = [[rng.randrange(VOCABULARY) for _ in range(BEGINNING)] for _ in range(GROUPS)]
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.good_tokens, self.preempted, self.ttft = 0, 0, []

    def take(self, number: int) -> None:
        rng = random.Random(number)
        prompt = self._beginnings[rng.randrange(GROUPS)] + [rng.randrange(VOCABULARY) for _ in range(rng.randint(*INPUT))]
        began = time.monotonic()
        try:
            session = self._client.create_session()
            result = session.turn(
                rng.choice(DECODERS), token_ids=prompt, max_tokens=rng.randint(*OUTPUT), ignore_eos=True, timeout_s=60
            )
            waited = result.usage.time_to_first_token_s
            outcome = "good" if waited <= self.objective_s else "late"
        except Overloaded:
            result, waited, outcome = None, time.monotonic() - began, "refused"
        except PrefillShareError as error:
            result, waited, outcome = None, 0.0, type(error).__name__
        with self._lock:
            self.outcomes[outcome] += 1
            if result:
                self.ttft.append(waited)
                self.preempted += result.usage.resumes
            if outcome == "good":
                self.good_tokens += result.usage.completion_tokens

    def closed(self, at_once: int, seconds: float) -> float:
        """Turns per second that end without an error while `at_once` turns are always in progress."""
        self.reset()
        ends_at, numbers = time.monotonic() + seconds, iter(range(10**9))

        def keep_taking() -> None:
            while time.monotonic() < ends_at:
                with self._lock:
                    number = next(numbers)
                self.take(number)

        began = time.monotonic()
        with ThreadPoolExecutor(at_once) as pool:
            for ended in [pool.submit(keep_taking) for _ in range(at_once)]:
                ended.result()
        return (self.outcomes["good"] + self.outcomes["late"]) / (time.monotonic() - began)

    def open(self, rate: float, seconds: float) -> dict:
        """Poisson arrivals at `rate` turns per second for `seconds`; measured until the last one has ended."""
        self.reset()
        rng, began = random.Random(99), time.monotonic()
        at, number, waiting = 0.0, 0, []
        with ThreadPoolExecutor(MOST_CLIENTS) as pool:
            while (at := at + rng.expovariate(rate)) < seconds:
                time.sleep(max(0.0, began + at - time.monotonic()))
                waiting.append(pool.submit(self.take, number))
                number += 1
            for one in waiting:
                one.result()
        elapsed = time.monotonic() - began
        ttft = sorted(self.ttft)
        return {
            "rate": round(rate, 3),
            "arrived": number,
            "outcomes": dict(self.outcomes),
            "elapsed_s": round(elapsed, 1),
            "goodput_turns_per_s": round(self.outcomes["good"] / elapsed, 4),
            "goodput_tokens_per_s": round(self.good_tokens / elapsed, 2),
            "preempted": self.preempted,
            "ttft_p50_s": round(ttft[len(ttft) // 2], 3) if ttft else None,
            "ttft_p95_s": round(ttft[int(len(ttft) * 0.95)], 3) if ttft else None,
        }


def deployment(model: Path, adapters: dict[str, Path], objective_s: float) -> Deployment:
    router = {"max_wait_s": objective_s, "expected_output_tokens": 48}
    sizes = {"prefill": {"kv_cache_gib": 0.3}, "decode": {"kv_cache_gib": 0.15}}
    return small.deployment(model, adapters, router=router, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=120, help="time at the knee, and at twice of it (default: 120)")
    parser.add_argument("--objective-s", type=float, default=10, help="objective for the first token, seconds (default: 10)")
    args = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("starting engines", total=MOST_RATES + 4)
        model = fetch(MODEL)
        adapters = make_seeded_adapters(model, Path(folder), names=DECODERS)
        with running(deployment(model, adapters, 0.6 * args.objective_s)), Client(ADDRESS, retries=None) as client:
            load = Load(client, args.objective_s)
            progress.update(task, advance=1, description="capacity")
            load.closed(AT_ONCE, args.seconds / 10)  # warm-up
            capacity = load.closed(AT_ONCE, args.seconds / 3)
            points = []
            for number in range(MOST_RATES):
                rate = capacity * STEP**number
                progress.update(task, advance=1, description=f"{rate:.2f} turns/s")
                points.append(load.open(rate, args.seconds / 3))
                console.print(points[-1])
                if points[-1]["outcomes"].get("good", 0) < GOOD_SHARE * points[-1]["arrived"]:
                    break
            rate = points[-2 if len(points) > 1 else -1]["rate"]
            runs: dict[str, list[dict]] = {"knee": [], "overload": []}
            for _ in range(REPEATS):
                for name, factor in (("knee", 1), ("overload", 2)):
                    progress.update(task, completed=MOST_RATES + 1, description=name)
                    runs[name].append(load.open(factor * rate, args.seconds / REPEATS))
                    console.print(name, runs[name][-1])
    headline = {
        f"goodput_ratio{unit}": round(sum(r[figure] for r in runs["overload"]) / sum(r[figure] for r in runs["knee"]), 3)
        for unit, figure in (("", "goodput_turns_per_s"), ("_tokens", "goodput_tokens_per_s"))
    } | {
        "knee_turns_per_s": rate,
        "refused_at_2x": sum(run["outcomes"].get("refused", 0) for run in runs["overload"]),
        "preempted_at_2x": sum(run["preempted"] for run in runs["overload"]),
    }
    parts = {"closed_loop_turns_per_s": round(capacity, 3), "search": points} | runs
    write("overload", console, vars(args), headline, **parts)


if __name__ == "__main__":
    main()
