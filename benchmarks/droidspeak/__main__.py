"""What DroidSpeak saves: time to the first token of a decoder that has not seen a context, against its own full prefill.

    python -m benchmarks.droidspeak [--profiled FOLDER] [--layers 4-7] [--tokens 512 1024 2048 4096] [--repeats 3]

The layers are those of the profiled point: the best group in a fine-tune's profile with at most 15 % of the layers. The right
answers that this fine-tune loses there, against its own full prefill, are measured too.

A decoder with weights of its own is served twice on the same cores, in mode droidspeak and in mode none. For each length and
repeat:
 - droidspeak: the shared pool has prefilled the context for somebody else (the base answers one token); then the decoder, whose
   engine has never seen it, takes a turn.
 - none: the decoder takes the same turn, and its own prefill engine computes all of it.
Then single turns without a router, in which the decode engine either begins with its own layers while the other layers' KV is
still loading, or waits for all KV: the gain through shared memory and over a link of `--link-mbit`, with a trace of the latter
beside the result, for chrome://tracing or Perfetto.
Then sessions whose turns go round `--decoders` such decoders, adapters over one engine per role, with the same KV memory.

The arithmetic limit of the first comparison is layers / layers recomputed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.droidspeak import overlap
from benchmarks.droidspeak.quality import profiled_point, quality
from benchmarks.shared.result import RESULTS, write
from benchmarks.shared.sessions import Lengths, play
from benchmarks.shared.small import ADDRESS, BLOCK, GRPC_PORT, HTTP_PORT, MODEL, VOCABULARY, bars, deployment
from prefillshare.app import running
from prefillshare.client import Client
from prefillshare.finetuning.tasks import TASKS
from prefillshare.kvshare.config import Deployment, parse
from prefillshare.kvshare.contract import KVShape
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.modes import get_mode
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_full_decoder

MODES = ("droidspeak", "none")
#: Largest share of the layers; and the fine-tune for which so few are enough.
MOST_LAYERS = 0.15
PROFILED = Path("adapters/arithmetic-last-layers")
KV_GIB = 1.0
TURNS, LENGTHS = 5, Lengths(beginning=512, given=64, answer=16)


def one_decoder(base: Path, decoder: Path, adapter: Path, mode: str, layers: str, longest: int) -> Deployment:
    """Prefill on the first core, decode on the second. In the shared pool the base is served, too, to fill the cache."""
    own = {"prefill": {"kv_cache_gib": KV_GIB, "cpu_cores": "0"}}
    if get_mode(mode).recomputes:
        own = {"own_layers": {"own": layers}}
    size = {"kv_cache_gib": KV_GIB, "cpu_cores": "1"}
    pools = [{"pool": "own", "sharing": mode, "model": str(decoder), **size, **own}]
    if get_mode(mode).recomputes:
        pools.append({"pool": "others", "sharing": mode, "adapters": {"other": str(adapter)}, "max_lora_rank": 8, **size})
    return parse({
        "base": {"model": str(base), "dtype": "float32", "max_model_len": longest + 2 * BLOCK, "block_size": BLOCK},
        "prefill": {"kv_cache_gib": KV_GIB, "cpu_cores": "0"},
        "decode": pools,
        "router": {"http_port": HTTP_PORT, "grpc_port": GRPC_PORT, "eager_prefill": False, "canary_share": 0.0},
    })  # fmt: skip


def first_tokens(client: Client, mode: str, lengths: list[int], repeats: int, advance) -> dict[str, dict[str, float]]:
    """Context length -> medians: seconds to the first token, and the prefill pool's part of them."""
    found = {}
    for tokens in lengths:
        ttft, prefill = [], []
        for repeat in range(repeats):
            rng = random.Random(f"{tokens} {repeat}")
            context = [rng.randrange(VOCABULARY) for _ in range(tokens)]
            if get_mode(mode).recomputes:
                client.create_session(token_ids=context).turn("base", token_ids=[1], max_tokens=1)
            usage = client.create_session(token_ids=context).turn("own", token_ids=[2], max_tokens=1).usage
            ttft.append(usage.time_to_first_token_s)
            prefill.append(usage.prefill_s)
            advance()
        found[str(tokens)] = {"ttft_s": round(statistics.median(ttft), 4), "prefill_s": round(statistics.median(prefill), 4)}
    return found


def throughput(model: Path, folder: Path, layers: str, args: argparse.Namespace, progress: Progress) -> dict[str, dict]:
    """Number of decoders -> mode -> figures of the sessions."""
    adapters = make_seeded_adapters(model, folder, names=[f"agent-{n}" for n in range(max(args.decoders))])
    found: dict[str, dict] = {}
    for count in args.decoders:
        chosen = dict(list(adapters.items())[:count])
        for mode in MODES:
            sizes = {"kv_cache_gib": KV_GIB}
            own = {"prefill": {**sizes, "cpu_cores": "0"}}
            if get_mode(mode).recomputes:
                own = {"own_layers": dict.fromkeys(chosen, layers)}
            tree = deployment(
                model, chosen, prefill=sizes, decode={**sizes, "sharing": mode, **own}, router={"canary_share": 0.0}
            )
            task = progress.add_task(f"{count} decoders, {mode}", total=args.sessions * TURNS)
            with running(tree), Client(ADDRESS, retries=None) as client:
                def advance(task=task) -> None:
                    progress.advance(task)

                figures = play(client, list(chosen), TURNS, args.sessions, args.at_once, LENGTHS, seed=7, advance=advance)
            found.setdefault(str(count), {})[mode] = figures
    return found


def overlaps(
    model: Path, decoder: Path, group: LayerGroup, args: argparse.Namespace, console: Console, progress: Progress
) -> dict[str, dict]:
    """Link -> context length -> the gain by overlapping."""
    found = {}
    for link in (None, args.link_mbit) if args.link_mbit else (None,):
        name = f"{link} Mbit/s" if link else "shared memory"
        if link and not overlap.links():
            console.print(f"No link of {name} here: that needs root and iproute2. Left out.")
            continue
        total = len(args.tokens) * (args.repeats + 1) * len(overlap.WAYS)
        task = progress.add_task(f"overlap, {name}", total=total)
        turns = overlap.measured(
            model, decoder, group, args.tokens, args.repeats, link, lambda task=task: progress.advance(task)
        )
        overlap.write_trace(turns, RESULTS / "droidspeak_trace.json")
        console.print(f"{name}: {(summary := overlap.summary(turns))}")
        found[name] = summary
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--decoder", type=Path, help="folder of a fine-tune with all weights (default: made from a seed)")
    parser.add_argument(
        "--profiled", type=Path, default=PROFILED, help=f"fine-tune with a layer profile (default: {PROFILED})"
    )
    parser.add_argument("--layers", help="group they compute themselves (default: the profile's best of at most 15 %%)")
    parser.add_argument("--suite", default="arithmetic", choices=TASKS, help="asked of the fine-tune (default: arithmetic)")
    parser.add_argument("--questions", type=int, default=200, help="of the suite, evenly spread (default: 200)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="context lengths")
    parser.add_argument("--repeats", type=int, default=3, help="contexts of each length (default: 3)")
    parser.add_argument("--link-mbit", type=int, default=1000, help="speed of the slower link; 0: none (default: 1000)")
    parser.add_argument("--decoders", type=int, nargs="+", default=[2, 4], help="numbers of decoders (default: 2 4)")
    parser.add_argument("--sessions", type=int, default=8, help="sessions (default: 8)")
    parser.add_argument("--at-once", type=int, default=4, help="sessions at once (default: 4)")
    args = parser.parse_args()
    console, model = Console(stderr=True), fetch(MODEL)
    group = LayerGroup.parse(args.layers) if args.layers else profiled_point(model, args.profiled, MOST_LAYERS)
    layers = str(group)
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress:
        decoder = args.decoder or make_full_decoder(model, Path(folder) / "full", seed=1, noise=0.02)
        adapter = make_seeded_adapters(model, Path(folder) / "unused", names=["adapter"])["adapter"]
        by_mode = {}
        for mode in MODES:
            tree = one_decoder(model, decoder, adapter, mode, layers, max(args.tokens))
            task = progress.add_task(f"first tokens, {mode}", total=len(args.tokens) * args.repeats)
            with running(tree), Client(ADDRESS, retries=None) as client:
                def advance(task=task) -> None:
                    progress.advance(task)

                by_mode[mode] = first_tokens(client, mode, args.tokens, args.repeats, advance)
            console.print(f"{mode}: {by_mode[mode]}")
        by_link = overlaps(model, decoder, group, args, console, progress)
        sessions = throughput(model, Path(folder) / "adapters", layers, args, progress)
        task = progress.add_task(f"{args.suite}, answered both ways", total=2 * args.questions)
        answered = quality(model, args.profiled, group, args.suite, args.questions, lambda n: progress.advance(task, n))
        console.print(f"quality: {answered}")
    limit = KVShape.of(model).layers / len(group)
    headline = {"arithmetic_limit": round(limit, 2)}
    for tokens in map(str, args.tokens):
        ours, own = by_mode["droidspeak"][tokens]["ttft_s"], by_mode["none"][tokens]["ttft_s"]
        headline[f"ttft_speedup_{tokens}"] = round(own / ours, 2)
        for link, by_length in by_link.items():
            headline[f"overlap_speedup_{tokens}, {link}"] = by_length[tokens]["speedup"]
    for count, modes in sessions.items():
        ratio = modes["droidspeak"]["turns_per_s"] / modes["none"]["turns_per_s"]
        headline[f"n{count}_throughput_to_none"] = round(ratio, 3)
    headline |= {f"quality_{name}": answered[name] for name in ("points", "points_low", "points_high")}
    config = vars(args) | {"decoder": str(args.decoder or "seeded"), "kv_gib_per_engine": KV_GIB}
    config |= {"layers": layers, "profiled": str(args.profiled)}
    config |= {"turns": TURNS, **LENGTHS._asdict()}
    write("droidspeak", console, config, headline, first_tokens=by_mode, overlap=by_link, sessions=sessions, quality=answered)


if __name__ == "__main__":
    main()
