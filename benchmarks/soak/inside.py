"""The part of a campaign that runs on the first host: the system, its clients and its faults. benchmarks.soak starts it, and
reads what it prints, a JSON object per line: {"leg": number, "found": ..., "samples": ...}, {"turns": so far}, {"told": text},
and {"cut": seconds}, which asks for a link to be cut, as only the machine itself can."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.shared.hosts import Host
from benchmarks.soak import leg
from benchmarks.soak.system import running_system
from benchmarks.soak.truth import Truth


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("folder", type=Path, help="for models, logs and Redis' data")
    parser.add_argument("--seed", required=True)
    parser.add_argument("--legs", type=int, nargs="+", required=True, help="numbers of those that are to run")
    parser.add_argument("--turns", type=int, required=True, help="turns of a leg")
    parser.add_argument("--hosts", default="", help="tag of the two hosts; left out: everything is on loopback")
    parser.add_argument("--disk", type=Path, help="a folder of a small file system of its own, for Redis")
    args = parser.parse_args()
    out, telling = os.fdopen(os.dup(sys.stdout.fileno()), "w"), threading.Lock()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what Ray and engines print is no event

    def tell(**event) -> None:
        with telling:
            print(json.dumps(event), file=out, flush=True)

    def cut(seconds: float) -> None:
        tell(cut=seconds)
        time.sleep(seconds + 1)

    hosts = (Host(args.hosts, 1, ""), Host(args.hosts, 2, "")) if args.hosts else None
    with running_system(args.folder, hosts, args.disk or args.folder) as system:
        truth = Truth(system.deployment)
        for number in args.legs:
            before = number * args.turns
            found, samples = leg.run(
                system, truth, f"{args.seed}/{number}", args.turns, before, tell, cut if hosts else None, args.disk
            )
            tell(leg=number, found=found.as_dict(), samples=[asdict(sample) for sample in samples])
            if found.hung:
                tell(told="Something hangs: the rest of the campaign would only say so again.")
                break


if __name__ == "__main__":
    main()
