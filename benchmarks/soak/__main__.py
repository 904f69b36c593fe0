"""A campaign that looks for what is lost, wrong, leaked or hung.

    python -m benchmarks.soak [--turns 10000] [--seed 0]

Two hosts (network namespaces, where they can be had) have two prefill replicas, two of a pool of LoRA decoders, and a pool each
in mode icarus, droidspeak and none, of tiny random models; two routers share Redis. Eight clients take turns over gRPC sessions
(suffixes, forks, cancels, short deadlines, slow readers, two turns at once) and over OpenAI's and Anthropic's HTTP surfaces.
Meanwhile faults strike, drawn from the seed, some before the last has passed: routers, replicas, engines, Serve's controller,
proxies, a raylet and Redis are killed; routers, replicas and Redis hang and come back; the link between the hosts is cut and
healed; Redis' disk is full; decoders are added and taken away by `apply`; HTTP clients hang up. Leases are short.

Each token's log-probability is compared with plain transformers, each greedy token with the likeliest, a fifth of the sampled
turns with the same turn when all is quiet, and each session's context with its history. After each leg of the campaign nothing
may be held any more. What a leg has found is kept in runs/soak, so that a campaign that is started again goes on.

The last line is JSON: `turns`, `lost`, `wrong`, `leaked`, `hung`, `rss_slope_bytes_per_turn` (of the kind of process that grows
fastest; per kind in benchmarks/results/soak.json).
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from benchmarks.shared.children import events
from benchmarks.shared.environment import revision
from benchmarks.shared.hosts import Host, Hosts, why_not
from benchmarks.shared.result import write
from benchmarks.shared.small import bars
from benchmarks.soak.findings import Findings
from benchmarks.soak.watching import Sample, growth

RUNS = Path("runs/soak")
DISK_MIB = 24
#: Seconds that the campaign may take beyond its turns, and per turn.
START_S, TURN_S = 900.0, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--turns", type=int, default=10_000, help="of the campaign (default: 10000)")
    parser.add_argument("--leg", type=int, default=500, help="turns after which all becomes quiet (default: 500)")
    parser.add_argument("--seed", default="0", help="from which clients and faults are drawn (default: 0)")
    parser.add_argument("--on-loopback", action="store_true", help="no hosts of their own, and no links to cut")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # hosts, disk and processes end with it
        signal.signal(number, lambda *_: sys.exit(143))
    console = Console(stderr=True)
    runs = RUNS / f"{revision()}-seed-{args.seed}-leg-{args.leg}"
    runs.mkdir(parents=True, exist_ok=True)
    legs = range(-(-args.turns // args.leg))
    missing = [number for number in legs if not _file(runs, number).is_file()]
    if missing:
        _run(missing, args, runs, console)
    told = [json.loads(_file(runs, number).read_text()) for number in legs if _file(runs, number).is_file()]
    found = Findings.summed(Findings.of(one["found"]) for one in told)
    samples = [Sample(**sample) for one in told for sample in one["samples"]]
    slopes = growth(samples, lambda sample: sample.rss)
    files = growth(samples, lambda sample: sample.files)
    headline = {
        "turns": found.turns, "lost": found.lost, "wrong": found.wrong, "leaked": found.leaked.total(), "hung": found.hung,
        "rss_slope_bytes_per_turn": round(max(slopes.values(), default=0.0)), "faults": found.faults.total(),
        "right": found.right, "refused": found.refused.total(), "seconds": round(found.seconds),
    }  # fmt: skip
    for problem in found.problems:
        console.print(problem, highlight=False, markup=False)
    parts = {"found": found.as_dict(), "rss_bytes_per_turn": slopes, "files_per_turn": files}
    write("soak", console, vars(args), headline, **parts)
    if found.lost or found.wrong or found.leaked or found.hung:
        raise SystemExit(1)


def _file(runs: Path, number: int) -> Path:
    return runs / f"leg-{number:03}.json"


def _run(missing: list[int], args: argparse.Namespace, runs: Path, console: Console) -> None:
    with ExitStack() as until_the_end:
        folder = Path(until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        command = [sys.executable, "-m", "benchmarks.soak.inside", str(folder), "--seed", args.seed, "--turns", str(args.leg)]
        command += ["--legs", *map(str, missing)]
        other: Host | None = None
        if args.on_loopback or (why := why_not()):
            console.print(f"On loopback, without links to cut{'' if args.on_loopback else f': {why}'}")
        else:
            hosts = Hosts(2)
            first, other = until_the_end.enter_context(hosts)
            command = first.on_it([*command, "--hosts", hosts.tag])
        disk = until_the_end.enter_context(_small_disk(folder / "disk", console))
        if disk:
            command += ["--disk", str(disk)]
        progress = until_the_end.enter_context(bars(console))
        bar = progress.add_task("turns", total=args.turns, completed=missing[0] * args.leg)
        for event in events(list(map(str, command)), START_S + TURN_S * args.leg * len(missing)):
            if "leg" in event:
                _file(runs, event["leg"]).write_text(json.dumps(event))
            elif "turns" in event:
                progress.update(bar, completed=event["turns"])
            elif "cut" in event and other:
                threading.Thread(target=_cut, args=(other, event["cut"])).start()
            elif "told" in event:
                console.print(event["told"], highlight=False)


def _cut(host: Host, seconds: float) -> None:
    host.cut()
    time.sleep(seconds)
    host.heal()


@contextmanager
def _small_disk(folder: Path, console: Console) -> Iterator[Path | None]:
    """A file system of a few MiB, which can be filled; None where it cannot be had."""
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", f"size={DISK_MIB}m", "soak", str(folder)]
    done = subprocess.run([mount, *options], capture_output=True, text=True) if mount else None
    if done is None or done.returncode:
        console.print(f"Without a disk to fill: {done.stderr.strip() if done else 'there is no mount'}")
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


if __name__ == "__main__":
    main()
