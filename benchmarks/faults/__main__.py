"""What faults cost: turns go on while everything that can fail is killed or hung in turn.

    python -m benchmarks.faults [--turns 200]

Two Ray nodes have a prefill and a decode replica of a tiny random model each, and there are two routers with Redis. Greedy and
seeded turns run over multi-turn gRPC sessions, each on a connection of its own, with completions over HTTP beside them. The
trace is played once without faults, for the tokens that it must give, then again while faults strike, each after the system is
whole again, until every kind has struck: routers, replicas, engines, Serve's controller and a proxy, a node's raylet, and Redis
are killed; replicas and Redis hang and come back; HTTP clients hang up.

A turn is lost if it ends in an error or never ends, and wrong if a single token differs. When a router dies, or the session
store is away, clients check whether the turn was committed and otherwise take it again, which counts as `turns_taken_again`.
HTTP answers that a dead proxy carried are counted separately. A replica is wrongly ejected if it gets no turns although no
fault was aimed at it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

from rich.console import Console

from benchmarks.faults.http_turns import HttpTurns
from benchmarks.faults.nodes import Nodes
from benchmarks.faults.player import Player, make_trace
from benchmarks.faults.strikes import HANG_S, REDIS_AWAY_S, Faults
from benchmarks.shared import small
from benchmarks.shared.redis_server import RedisServer
from benchmarks.shared.result import write
from benchmarks.shared.small import DECODERS, MODEL, bars
from prefillshare.app import running
from prefillshare.kvshare.config import Deployment
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

WEDGED_AFTER_S = 4
WHOLE_TIMEOUT_S = 180
#: Ports below those that Ray gives to its workers.
REDIS_PORT, RAY_PORT = 7_000, 7_001
#: Faults that end a proxy, and with it the answers that it carries.
OF_PROXIES = ("kill proxy", "kill raylet")


def deployment(model: Path, adapters: dict[str, Path], redis_url: str, address: str) -> Deployment:
    def sizes(slot: str) -> dict:
        return {"replicas": 2, "kv_cache_gib": 0.05, "resources": {slot: 1}}

    cluster = {"kv_lease_s": 15, "kv_load_timeout_s": 5, "address": address}
    router = {"wedged_after_s": WEDGED_AFTER_S, "replicas": 2, "redis_url": redis_url, "resources": {"head": 0.01}}
    prefill, decode = sizes("prefill-slot"), sizes("decode-slot")
    return small.deployment(model, adapters, prefill=prefill, decode=decode, router=router, cluster=cluster)


def blocks_held(handle) -> int:
    """Blocks still held when nothing runs and every lease can have ended. Raises TimeoutError if not all replicas report."""
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
    """Number of tokens that are different, missing or superfluous."""
    return sum(a != b for a, b in zip_longest(got, wanted))


def cost_by_fault(faults: Faults, quiet: Player, struck: Player) -> dict[str, dict[str, float]]:
    """Per kind of fault: by how many seconds it prolonged the turns that were running when it struck."""
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
    parser.add_argument("--most-rounds", type=int, default=12, help="times it is played if faults take long (default: 12)")
    parser.add_argument("--at-once", type=int, default=4, help="turns at a time (default: 4)")
    args = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress, ExitStack() as until_the_end:
        model = make_base("llama", Path(folder) / "base", fetch(MODEL))
        adapters = make_seeded_adapters(model, Path(folder) / "adapters", names=DECODERS)
        start = progress.add_task("starting engines", total=None)
        redis = until_the_end.enter_context(RedisServer(Path(folder), REDIS_PORT))
        nodes = until_the_end.enter_context(Nodes(Path(folder), RAY_PORT))
        handle = until_the_end.enter_context(running(deployment(model, adapters, redis.url, nodes.address)))
        progress.remove_task(start)
        trace = make_trace(args.turns)
        quiet_bar = progress.add_task("in peace", total=args.turns)
        quiet = Player(args.at_once, lambda: progress.advance(quiet_bar))
        quiet.play(trace)
        bar = progress.add_task("under faults", total=args.turns)
        struck = Player(args.at_once, lambda: progress.advance(bar))
        faults = Faults(handle, nodes, redis, console.print)
        with HttpTurns(lambda: faults.now) as over_http, faults:
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
        "http_answers": over_http.right,
        "http_lost": sum(count for kind, count in over_http.lost.items() if kind not in OF_PROXIES),
        "http_lost_with_a_proxy": sum(over_http.lost[kind] for kind in OF_PROXIES),
        "http_wrong": over_http.wrong,
        "blocks_leaked": leaked,
        "replicas_wrongly_ejected": len(faults.ejected),
        "faults": len(faults.struck),
        "faults_left_out": len(faults.kinds) - len({kind for kind, _ in faults.struck}),
        "turns_resumed": struck.resumes,
        "turns_taken_again": struck.taken_again,
    }
    cost = cost_by_fault(faults, quiet, struck)
    for kind, one in cost.items():
        console.print(f"{kind}: {one['turns']} turns took {one['median_s']} s longer (median), {one['max_s']} s at most")
    config = vars(args) | {"wedged_after_s": WEDGED_AFTER_S, "hang_s": HANG_S, "redis_away_s": REDIS_AWAY_S}
    times = {"known_after_s": faults.known_after_s, "whole_after_s": faults.back_after_s}
    write("faults", console, config, headline, cost_s=cost, **times, http_lost=over_http.lost, errors=struck.errors)


if __name__ == "__main__":
    main()
