"""What faults cost: turns go on while prefill and decode replicas are killed or hung in turn.

    python -m benchmarks.faults [--turns 200]

Two prefill and two decode replicas of a tiny random model, greedy and seeded turns over multi-turn sessions. The trace
is played once in peace, for the tokens it must give; then again while faults strike, each after the system is whole
again. A turn is lost if it ends in an error or without an end, wrong if a single token differs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks import small
from benchmarks.result import write
from benchmarks.small import ADDRESS, DECODERS, VOCABULARY, bars
from kvshare.config import Deployment
from kvshare.errors import PrefillShareError
from prefillshare.app import running
from prefillshare.client import Client
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

TURNS_PER_SESSION = 4
INPUT, OUTPUT = (20, 120), (20, 60)
WEDGED_AFTER_S, HANG_S = 4, 12
WHOLE_TIMEOUT_S = 180


@dataclass(frozen=True)
class Turn:
    decoder: str
    token_ids: tuple[int, ...]
    sampling: dict


def make_trace(turns: int, seed: int = 0) -> list[list[Turn]]:
    """Sessions of TURNS_PER_SESSION turns."""
    rng, sessions = random.Random(seed), []
    for number in range(-(-turns // TURNS_PER_SESSION)):
        sessions.append([
            Turn(
                rng.choice(DECODERS),
                tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(*INPUT))),
                {"max_tokens": rng.randint(*OUTPUT), "ignore_eos": True}
                | ({"temperature": 0.8, "seed": rng.randrange(10_000)} if rng.random() < 0.5 else {}),
            )
            for _ in range(min(TURNS_PER_SESSION, turns - number * TURNS_PER_SESSION))
        ])  # fmt: skip
    return sessions


class Player:
    """Plays sessions, several at a time; keeps what every turn gave, or how it failed."""

    def __init__(self, client: Client, at_once: int, advance: Callable[[], None]):
        self._client, self._at_once, self._advance = client, at_once, advance
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.seconds: dict[tuple[int, int], float] = {}
        self.began_at: dict[tuple[int, int], float] = {}
        self.resumes = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def play(self, sessions: list[list[Turn]]) -> None:
        with ThreadPoolExecutor(self._at_once) as pool:
            for ended in [pool.submit(self._session, number, turns) for number, turns in enumerate(sessions)]:
                ended.result()

    def _session(self, number: int, turns: list[Turn]) -> None:
        session = self._client.create_session()
        for count, turn in enumerate(turns):
            began = time.monotonic()
            try:
                result = session.turn(turn.decoder, token_ids=turn.token_ids, timeout_s=120, **turn.sampling)
            except PrefillShareError as error:
                with self._lock:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    self._advance()
                break  # what follows builds on this turn
            with self._lock:
                self.tokens[number, count] = result.token_ids
                self.began_at[number, count] = began
                self.seconds[number, count] = time.monotonic() - began
                self.resumes += result.usage.resumes
                self._advance()
        session.delete()


class Faults:
    """Strikes a prefill and a decode replica in turn, in each of three ways; in between the system becomes whole."""

    def __init__(self, handle, log: Callable[[str], None]):
        self._handle, self._log = handle, log
        self.struck: list[tuple[str, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Faults:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        kinds = [(pool, how) for how in ("kill", "hang", "kill engine") for pool in ("prefill", "agents")]
        number = 0
        while not self._stop.is_set():
            try:
                if self.whole():
                    self._strike(*kinds[number % len(kinds)])
                    number += 1
            except Exception as error:  # a replica that is going cannot be asked; the next round can
                self._log(f"[dim]{type(error).__name__}: asked again[/]")
            self._stop.wait(0.5)

    def info(self) -> dict:
        return self._handle.replica_info.remote().result(timeout_s=60)

    def whole(self) -> bool:
        return all(len(p) == 2 and all(r["usable"] for r in p.values()) for p in self.info().values())

    def _strike(self, pool: str, how: str) -> None:
        stats = self._handle.replica_stats.remote().result(timeout_s=60)[pool]
        busiest = max(stats, key=lambda replica: stats[replica]["active"])
        parent = psutil.Process(self.info()[pool][busiest]["pid"])
        engine = parent.children(recursive=True)
        self.struck.append((f"{how} {pool}", time.monotonic()))
        self._log(f"{how}: {pool} {busiest}")
        if how == "kill":
            parent.kill()
        elif how == "kill engine":
            for process in engine:
                os.kill(process.pid, signal.SIGKILL)
        else:
            stopped = [parent, *engine]
            for process in stopped:
                process.suspend()
            self._stop.wait(HANG_S)
            for process in stopped:
                process.resume()
            return
        deadline = time.monotonic() + 30
        while busiest in self.info()[pool] and time.monotonic() < deadline:
            self._stop.wait(0.2)


def deployment(model: Path, adapters: dict[str, Path]) -> Deployment:
    sizes = {"replicas": 2, "kv_cache_gib": 0.05}
    cluster = {"kv_lease_s": 15, "kv_load_timeout_s": 5}
    router = {"wedged_after_s": WEDGED_AFTER_S}
    return small.deployment(model, adapters, prefill=sizes, decode=sizes, router=router, cluster=cluster)


def blocks_held(handle) -> int:
    """Blocks still held once nothing runs and every lease could have ended."""
    deadline = time.monotonic() + 40
    while True:
        pools = handle.replica_stats.remote().result(timeout_s=60)
        held = int(sum(r["blocks_used"] for replicas in pools.values() for r in replicas.values()))
        if not held or time.monotonic() > deadline:
            return held
        time.sleep(0.5)


def cost_by_fault(faults: Faults, quiet: Player, struck: Player) -> dict[str, dict[str, float]]:
    """Per kind of fault: how much longer turns took that were running when it struck, seconds."""
    cost: dict[str, list[float]] = {}
    for kind, at in faults.struck:
        for turn, began in struck.began_at.items():
            if began <= at <= began + struck.seconds[turn]:
                cost.setdefault(kind, []).append(struck.seconds[turn] - quiet.seconds[turn])
    return {
        kind: {"turns": len(extra), "median_s": round(statistics.median(extra), 2), "max_s": round(max(extra), 2)}
        for kind, extra in cost.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--turns", type=int, default=200, help="turns while faults strike (default: 200)")
    parser.add_argument("--at-once", type=int, default=4, help="turns at a time (default: 4)")
    args = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress:
        model = make_base("llama", Path(folder) / "base", fetch("smollm2-135m-instruct", Path("models/smollm2-135m-instruct")))
        adapters = make_seeded_adapters(model, Path(folder) / "adapters", names=DECODERS)
        start = progress.add_task("starting engines", total=None)
        with running(deployment(model, adapters)) as handle, Client(ADDRESS) as client:
            progress.remove_task(start)
            trace = make_trace(args.turns)
            players = []
            for name in ("in peace", "under faults"):
                task = progress.add_task(name, total=args.turns)
                players.append(Player(client, args.at_once, lambda task=task: progress.advance(task)))
                if name == "in peace":
                    players[-1].play(trace)
                    continue
                with Faults(handle, console.print) as faults:
                    players[-1].play(trace)
                deadline = time.monotonic() + WHOLE_TIMEOUT_S
                while not faults.whole() and time.monotonic() < deadline:
                    time.sleep(0.5)
            leaked = blocks_held(handle)
    quiet, struck = players
    headline = {
        "turns": args.turns,
        "turns_lost": args.turns - len(struck.tokens),
        "wrong_tokens": sum(struck.tokens[t] != quiet.tokens.get(t) for t in struck.tokens),
        "blocks_leaked": leaked,
        "faults": len(faults.struck),
        "turns_resumed": struck.resumes,
    }
    cost = cost_by_fault(faults, quiet, struck)
    for kind, one in cost.items():
        console.print(f"{kind}: {one['turns']} turns took {one['median_s']} s longer (median), {one['max_s']} s at most")
    config = vars(args) | {"wedged_after_s": WEDGED_AFTER_S, "hang_s": HANG_S}
    write("faults", console, config, headline, cost_s=cost, errors=struck.errors)


if __name__ == "__main__":
    main()
