"""What ICaRus costs and saves: decode steps against a plain model, and five-turn sessions against the other modes.

    python -m benchmarks.icarus [--adapters 2 4 8] [--sessions 8] [--repeats 3]

 1. A decode step of a plain model, of the same model with an adapter per request, and of two streams with an adapter per
    request, at several batch sizes. The engines take turns on the same cores.
 2. Sessions of five turns that go round N adapters, in modes icarus, prefillshare and none, on the same cores, with the same
    KV memory over prefill and decode engines, for the same requests. Measured are computed tokens and latency; and the KV
    blocks in caches after one session, of the same length for every N, in which every adapter had its turn.
    Nothing is prefilled ahead (eager prefill is off): a turn computes what no cache holds. Pull-back is always on.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.icarus import steps
from benchmarks.shared import small
from benchmarks.shared.cache_watch import CacheWatch
from benchmarks.shared.result import write
from benchmarks.shared.sessions import Lengths, play
from benchmarks.shared.small import ADDRESS, BLOCK, MODEL, bars
from prefillshare.app import running
from prefillshare.client import Client
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.modes import get_mode
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters

MODES = ("icarus", "prefillshare", "none")
TURNS, LENGTHS = 5, Lengths(beginning=128, given=24, answer=48)
#: KV memory of a prefill engine, and of a decode engine.
KV_GIB = 0.5
ROUTER = {"eager_prefill": False, "pull_back": "always"}


def step_times(
    model: Path, adapters: dict[str, Path], args: argparse.Namespace, progress: Progress
) -> dict[str, dict[str, dict]]:
    """Batch size -> system -> seconds of a decode step: the median over repeats, and the ratio to the plain model's."""
    batches = [str(batch) for batch in args.batches]
    task = progress.add_task("decode steps", total=len(batches) * args.repeats * len(steps.SYSTEMS))
    times: dict[str, dict[str, list[float]]] = {batch: {name: [] for name in steps.SYSTEMS} for batch in batches}
    with steps.children(model, adapters, args.cores, args.context, max(args.batches)) as engines:
        for repeat in range(args.repeats):
            order = list(engines)[repeat % len(engines) :] + list(engines)[: repeat % len(engines)]
            for batch in batches:
                for name in order:
                    times[batch][name].append(engines[name].step_s(int(batch), args.steps))
                    progress.advance(task)
    found = {}
    for batch, by_system in times.items():
        pairs = {name: list(zip(taken, by_system["plain"], strict=True)) for name, taken in by_system.items()}
        found[batch] = {
            name: {
                "step_ms": round(1e3 * statistics.median(by_system[name]), 3),
                "ratio": round(statistics.median(own / plain for own, plain in pairs[name]), 3),
            }
            for name in by_system
        }
    return found


def deployment(model: Path, adapters: dict[str, Path], mode: str) -> Deployment:
    sizes = {"kv_cache_gib": KV_GIB}
    own = {} if get_mode(mode).shares_prefill else {"prefill": {**sizes, "cpu_cores": "0"}}
    return small.deployment(model, adapters, prefill=sizes, decode={**sizes, "sharing": mode, **own}, router=ROUTER)


def blocks_cached(handle) -> dict[str, int]:
    """Role -> blocks in the caches of its engines."""
    with CacheWatch(handle) as caches:
        return caches.held


def sessions(model: Path, folder: Path, args: argparse.Namespace, console: Console, progress: Progress) -> dict[str, dict]:
    """Number of adapters -> mode -> figures."""
    found: dict[str, dict] = {}
    modules = get_mode("icarus").adapter_modules
    adapters = make_seeded_adapters(model, folder, names=[f"agent-{n}" for n in range(max(args.adapters))], modules=modules)
    for count in args.adapters:
        chosen = dict(list(adapters.items())[:count])
        for mode in MODES:
            longest = max(args.adapters)
            task = progress.add_task(f"{count} adapters, {mode}", total=longest + (args.sessions + 1) * TURNS)
            with running(deployment(model, chosen, mode)) as handle, Client(ADDRESS, retries=None) as client:
                def advance(task=task) -> None:
                    progress.advance(task)

                names = list(chosen)
                play(client, names, longest, 1, 1, LENGTHS, seed=1, advance=advance)
                blocks = blocks_cached(handle)
                one = play(client, names, TURNS, 1, 1, LENGTHS, seed=2, advance=advance)
                loaded = play(client, names, TURNS, args.sessions, args.at_once, LENGTHS, seed=3, advance=advance)
            kv = sum(blocks.values())
            figures = {"one_session": one, "kv_blocks": blocks, "kv_blocks_total": kv, "loaded": loaded}
            found.setdefault(str(count), {})[mode] = figures
            console.print(f"{count} adapters, {mode}: {figures}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 4, 8], help="numbers of adapters (default: 2 4 8)")
    parser.add_argument("--sessions", type=int, default=8, help="sessions under load (default: 8)")
    parser.add_argument("--at-once", type=int, default=4, help="sessions at once under load (default: 4)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="batch sizes (default: 1 4 16 64)")
    parser.add_argument("--context", type=int, default=128, help="context of a decode step, tokens (default: 128)")
    parser.add_argument("--steps", type=int, default=24, help="decode steps per measurement (default: 24)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each batch size (default: 3)")
    parser.add_argument("--cores", default="0-1", help="cores of the decode steps (default: 0-1)")
    args = parser.parse_args()
    console, model = Console(stderr=True), fetch(MODEL)
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress:
        names = [f"agent-{n}" for n in range(steps.ADAPTERS)]
        modules = get_mode("icarus").adapter_modules
        adapters = make_seeded_adapters(model, Path(folder) / "steps", names=names, modules=modules)
        by_batch = step_times(model, adapters, args, progress)
        console.print(by_batch)
        by_count = sessions(model, Path(folder) / "sessions", args, console, progress)
    headline = {f"step_cost_ratio_b{batch}": systems["two streams"]["ratio"] for batch, systems in by_batch.items()}
    headline |= {f"with_adapters_ratio_b{batch}": s["plain with adapters"]["ratio"] for batch, s in by_batch.items()}
    for count, modes in by_count.items():
        ours, one = modes["icarus"], modes["icarus"]["one_session"]
        headline |= {
            f"n{count}_computed_again_most": one["computed_again_most"],
            f"n{count}_kv_blocks": ours["kv_blocks_total"],
        }
        for other in MODES[1:]:
            against = modes[other]["loaded"]
            headline[f"n{count}_throughput_to_{other}"] = round(ours["loaded"]["turns_per_s"] / against["turns_per_s"], 3)
            headline[f"n{count}_ttft_p95_to_{other}"] = round(ours["loaded"]["ttft_p95_s"] / against["ttft_p95_s"], 3)
    config = vars(args) | {"turns": TURNS, **LENGTHS._asdict(), "block": BLOCK, "kv_gib_per_engine": KV_GIB}
    write("icarus", console, config, headline, steps=by_batch, sessions=by_count)


if __name__ == "__main__":
    main()
