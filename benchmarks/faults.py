"""What faults cost: turns go on while replicas of every kind are killed or hung in turn.

    python -m benchmarks.faults [--turns 200]

Two prefill and two decode replicas of a tiny random model and two routers with Redis; greedy and seeded turns over
multi-turn sessions, each on a connection of its own. The trace is played once in peace, for the tokens it must give;
then again while faults strike, each after the system is whole again, until every kind has struck. A turn is lost if it
ends in an error or without an end, wrong if a single token differs. Where a router dies its clients find the connection
broken: they look whether the turn was committed and else take it again, which counts as `turns_taken_again`. The last
line is JSON.
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
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks import small
from benchmarks.redis_server import RedisServer
from benchmarks.result import write
from benchmarks.small import ADDRESS, DECODERS, MODEL, VOCABULARY, bars
from kvshare.config import Deployment
from kvshare.errors import Conflict, ConnectionLost, DeadlineExceeded, NotFound, PrefillShareError
from prefillshare.app import running
from prefillshare.client import Client, RemoteSession
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

TURNS_PER_SESSION = 4
INPUT, OUTPUT = (20, 120), (20, 60)
WEDGED_AFTER_S, HANG_S = 4, 12
TURN_TIMEOUT_S, WHOLE_TIMEOUT_S = 120, 180
PAUSE_S = 0.1
REDIS_PORT = 17_000
#: Every kind of fault, in the order in which they strike.
FAULTS = (("kill", "router"), *((how, pool) for how in ("kill", "hang", "kill engine") for pool in ("prefill", "agents")))


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


#: Round, session, turn.
Key = tuple[int, int, int]


class Player:
    """Plays sessions, several at a time; keeps what every turn gave, or how it failed."""

    def __init__(self, at_once: int, advance: Callable[[], None]):
        self._at_once, self._advance = at_once, advance
        self.tokens: dict[Key, list[int]] = {}
        self.seconds: dict[Key, float] = {}
        self.began_at: dict[Key, float] = {}
        self.resumes = self.taken_again = self.rounds = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def play(self, sessions: list[list[Turn]]) -> None:
        with ThreadPoolExecutor(self._at_once) as pool:
            for ended in [pool.submit(self._connected, number, turns) for number, turns in enumerate(sessions)]:
                ended.result()
        self.rounds += 1

    def _connected(self, number: int, turns: list[Turn]) -> None:
        with Client(ADDRESS) as client:
            self._session(client, number, turns)

    def _session(self, client: Client, number: int, turns: list[Turn]) -> None:
        name, context = f"{self.rounds}-{number}-{random.getrandbits(32):x}", []
        with suppress(Conflict):  # it was made, and the answer lost
            self._until_connected(lambda: client.create_session(name))
        session = client.session(name)
        for count, turn in enumerate(turns):
            key, began = (self.rounds, number, count), time.monotonic()
            context += turn.token_ids
            try:
                tokens = self._turn(session, context, turn)
            except PrefillShareError as error:
                with self._lock:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    self._advance()
                break  # what follows builds on this turn
            context += tokens
            with self._lock:
                self.tokens[key] = tokens
                self.began_at[key] = began
                self.seconds[key] = time.monotonic() - began
                self._advance()
        with suppress(NotFound):
            self._until_connected(session.delete)

    def _turn(self, session: RemoteSession, seen: list[int], turn: Turn) -> list[int]:
        """Its tokens. `seen`: the context with the turn's input. Taken again where the router died under it, unless it
        had been committed."""
        deadline, connected = time.monotonic() + TURN_TIMEOUT_S, True
        while True:
            try:
                result = session.turn(turn.decoder, token_ids=turn.token_ids, timeout_s=TURN_TIMEOUT_S, **turn.sampling)
                with self._lock:
                    self.resumes += result.usage.resumes
                return result.token_ids
            except ConnectionLost:
                if connected:
                    with self._lock:
                        self.taken_again += 1
                connected = False
            except Conflict:  # the dead router's hold on the session has yet to end
                if connected:
                    raise
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"a turn could not be taken for {TURN_TIMEOUT_S} s")
            context = self._until_connected(lambda: session.get(with_token_ids=True)).token_ids
            if len(context) > len(seen):
                return list(context[len(seen) :])
            time.sleep(PAUSE_S)

    @staticmethod
    def _until_connected(call):
        deadline = time.monotonic() + TURN_TIMEOUT_S
        while True:
            try:
                return call()
            except ConnectionLost:
                if time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_S)


def routers() -> list[psutil.Process]:
    """Routers of a deployment that this process started; one that starts or ends shows in its title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::ServeReplica:prefillshare:router"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


class Faults:
    """Strikes in every way in turn; in between the system becomes whole."""

    def __init__(self, handle, log: Callable[[str], None]):
        self._handle, self._log = handle, log
        self.struck: list[tuple[str, float]] = []
        #: Kind of death -> seconds until a router gave the replica no more work.
        self.known_after_s: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Faults:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self.whole():
                    self._strike(*FAULTS[len(self.struck) % len(FAULTS)])
            except Exception as error:  # a replica that is going cannot be asked; the next round can
                self._log(f"[dim]{type(error).__name__}: asked again[/]")
            self._stop.wait(0.5)

    def info(self) -> dict:
        return self._handle.replica_info.remote().result(timeout_s=60)

    @property
    def all_have_struck(self) -> bool:
        return len(self.struck) >= len(FAULTS)

    def whole(self) -> bool:
        pools = self.info().values()
        return len(routers()) == 2 and all(len(p) == 2 and all(r["usable"] for r in p.values()) for p in pools)

    def _strike(self, how: str, pool: str) -> None:
        if pool == "router":
            victim = routers()[0]
            self._struck(how, pool, str(victim.pid))
            victim.kill()
            self._until(lambda: not victim.is_running())
            return
        stats = self._handle.replica_stats.remote().result(timeout_s=60)[pool]
        busiest = max(stats, key=lambda replica: stats[replica]["active"])
        parent = psutil.Process(self.info()[pool][busiest]["pid"])
        engine = parent.children(recursive=True)
        self._struck(how, pool, busiest)
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
        self._until(lambda: not self.info()[pool].get(busiest, {}).get("usable"))
        self.known_after_s[f"{how} {pool}"] = round(time.monotonic() - self.struck[-1][1], 2)

    def _struck(self, how: str, pool: str, replica: str) -> None:
        self.struck.append((f"{how} {pool}", time.monotonic()))
        self._log(f"{how}: {pool} {replica}")

    def _until(self, gone: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not gone() and time.monotonic() < deadline:
            self._stop.wait(0.2)


def deployment(model: Path, adapters: dict[str, Path], redis_url: str) -> Deployment:
    sizes = {"replicas": 2, "kv_cache_gib": 0.05}
    cluster = {"kv_lease_s": 15, "kv_load_timeout_s": 5}
    router = {"wedged_after_s": WEDGED_AFTER_S, "replicas": 2, "redis_url": redis_url}
    return small.deployment(model, adapters, prefill=sizes, decode=sizes, router=router, cluster=cluster)


def blocks_held(handle) -> int:
    """Blocks still held once nothing runs and every lease could have ended. Raises TimeoutError if not all replicas say."""
    deadline = time.monotonic() + 40
    while True:
        pools = handle.replica_stats.remote().result(timeout_s=60)
        all_say = all(len(replicas) == 2 for replicas in pools.values())
        held = int(sum(r["blocks_used"] for replicas in pools.values() for r in replicas.values()))
        if all_say and not held:
            return 0
        if time.monotonic() > deadline:
            if not all_say:
                raise TimeoutError(f"not all replicas say what they hold: {pools}")
            return held
        time.sleep(0.5)


def wrong_tokens(got: list[int], wanted: list[int]) -> int:
    """Tokens that are others than they should be, missing, or too many."""
    return sum(a != b for a, b in zip_longest(got, wanted))


def cost_by_fault(faults: Faults, quiet: Player, struck: Player) -> dict[str, dict[str, float]]:
    """Per kind of fault: how much longer turns took that were running when it struck, seconds."""
    cost: dict[str, list[float]] = {}
    for kind, at in faults.struck:
        for turn, began in struck.began_at.items():
            if began <= at <= began + struck.seconds[turn]:
                cost.setdefault(kind, []).append(struck.seconds[turn] - quiet.seconds[0, *turn[1:]])
    return {
        kind: {"turns": len(extra), "median_s": round(statistics.median(extra), 2), "max_s": round(max(extra), 2)}
        for kind, extra in cost.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--turns", type=int, default=200, help="turns of the trace (default: 200)")
    parser.add_argument("--most-rounds", type=int, default=8, help="times it is played if faults take long (default: 8)")
    parser.add_argument("--at-once", type=int, default=4, help="turns at a time (default: 4)")
    args = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress, ExitStack() as until_the_end:
        model = make_base("llama", Path(folder) / "base", fetch(MODEL))
        adapters = make_seeded_adapters(model, Path(folder) / "adapters", names=DECODERS)
        start = progress.add_task("starting engines", total=None)
        redis = until_the_end.enter_context(RedisServer(Path(folder), REDIS_PORT))
        handle = until_the_end.enter_context(running(deployment(model, adapters, redis.url)))
        progress.remove_task(start)
        trace = make_trace(args.turns)
        quiet_bar = progress.add_task("in peace", total=args.turns)
        quiet = Player(args.at_once, lambda: progress.advance(quiet_bar))
        quiet.play(trace)
        bar = progress.add_task("under faults", total=args.turns)
        struck = Player(args.at_once, lambda: progress.advance(bar))
        with Faults(handle, console.print) as faults:
            while not faults.all_have_struck and struck.rounds < args.most_rounds:
                progress.update(bar, total=args.turns * (struck.rounds + 1))
                struck.play(trace)
        deadline = time.monotonic() + WHOLE_TIMEOUT_S
        while not faults.whole() and time.monotonic() < deadline:
            time.sleep(0.5)
        leaked = blocks_held(handle)
    turns = args.turns * struck.rounds
    headline = {
        "turns": turns,
        "turns_lost": turns - len(struck.tokens),
        "wrong_tokens": sum(wrong_tokens(got, quiet.tokens.get((0, *turn[1:]), [])) for turn, got in struck.tokens.items()),
        "blocks_leaked": leaked,
        "faults": len(faults.struck),
        "faults_left_out": len(FAULTS) - len({kind for kind, _ in faults.struck}),
        "turns_resumed": struck.resumes,
        "turns_taken_again": struck.taken_again,
    }
    cost = cost_by_fault(faults, quiet, struck)
    for kind, one in cost.items():
        console.print(f"{kind}: {one['turns']} turns took {one['median_s']} s longer (median), {one['max_s']} s at most")
    config = vars(args) | {"wedged_after_s": WEDGED_AFTER_S, "hang_s": HANG_S}
    write("faults", console, config, headline, cost_s=cost, known_after_s=faults.known_after_s, errors=struck.errors)


if __name__ == "__main__":
    main()
