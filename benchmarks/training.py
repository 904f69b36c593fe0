"""How fast is cache-conditioned training beside ordinary fine-tuning on the same data?

    python -m benchmarks.training [--transcripts 64] [--epochs 2]

Both methods get the same transcripts (tool calls made from a seed: long prompts, short responses), model, adapter and batches,
one after the other. The first epoch computes the prompts' base KV, later ones read it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.shared.result import write
from benchmarks.shared.small import MODEL
from prefillshare.finetuning import log
from prefillshare.finetuning.recipe import parse
from prefillshare.finetuning.tasks.tool_calls import ToolCalls
from prefillshare.finetuning.train import train
from prefillshare.models import fetch

METHODS = ("prefillshare", "icarus", "ordinary")


def run(method: str, data: Path, model: Path, folder: Path, args, console: Console) -> dict[str, float]:
    recipe = parse({
        "base": str(model), "method": method, "train": str(data), "output": str(folder / method), "epochs": args.epochs,
        "batch_size": 8, "micro_batch_size": 2, "max_tokens": args.max_tokens,
    })  # fmt: skip
    rows = log.read(train(recipe, console))
    speed = {}
    for epoch in (1, args.epochs):
        steps = [row for row in rows if row["epoch"] == epoch][1:]  # the first step warms up
        speed[epoch] = round(sum(r["tokens"] for r in steps) / sum(r["tokens"] / r["tokens_per_s"] for r in steps), 1)
    figures = json.loads((folder / method / "figures.json").read_text())
    return {
        "first_epoch_tokens_per_s": speed[1],
        "later_epoch_tokens_per_s": speed[args.epochs],
        "seconds": figures["seconds"],
        "base_kv_gib": round(figures["base_kv_bytes"] / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--transcripts", type=int, default=64, help="transcripts (default: 64)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs, at least 2 (default: 2)")
    parser.add_argument("--max-tokens", type=int, default=768, help="longest transcript (default: 768)")
    args = parser.parse_args()
    console, figures = Console(stderr=True), {}
    model = fetch(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        data.write_text("".join(json.dumps(t) + "\n" for t in ToolCalls("multiple").transcripts(args.transcripts, seed=1)))
        for method in METHODS:
            figures[method] = run(method, data, model, Path(folder), args, console)
            console.print(f"{method}: {figures[method]}")
    plain = figures["ordinary"]["later_epoch_tokens_per_s"]
    headline = {
        f"{method}_speedup_{when}_epoch": round(figures[method][f"{when}_epoch_tokens_per_s"] / plain, 2)
        for method in METHODS[:-1]
        for when in ("first", "later")
    }
    memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    write("training", console, vars(args), headline, methods=figures, peak_memory_gib=memory)


if __name__ == "__main__":
    main()
