"""What a prompt costs with two streams, relative to the plain model and to the plain model with the request's adapter.

    python -m benchmarks.icarus.prompts [--tokens 256 1024 1800] [--repeats 5]

The engines of benchmarks/icarus/steps.py take turns on the same cores. Each prompt is new to its engine; the time is that to
the token after it. The last line is JSON: tokens -> ratio, the median over repeats.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.icarus import steps
from benchmarks.shared.result import write
from benchmarks.shared.small import MODEL, bars
from prefillshare.kvshare.modes import get_mode
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 1800], help="lengths of prompts")
    parser.add_argument("--repeats", type=int, default=5, help="prompts of each length and engine")
    parser.add_argument("--cores", default="0-1", help="cores of the engines")
    args = parser.parse_args()
    console, model, times = Console(stderr=True), fetch(MODEL), {}
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress:
        names = [f"agent-{n}" for n in range(steps.ADAPTERS)]
        made = make_seeded_adapters(model, Path(folder), names=names, modules=get_mode("icarus").adapter_modules)
        task = progress.add_task("prompts", total=len(args.tokens) * (1 + args.repeats))
        with steps.children(model, made, args.cores, max(args.tokens), 1) as engines:
            for tokens in args.tokens:
                for repeat in range(1 + args.repeats):  # the first one is a warm-up
                    for name, engine in engines.items():
                        seconds = engine.prompt_s(tokens)
                        if repeat:
                            times.setdefault(str(tokens), {}).setdefault(name, []).append(round(seconds, 4))
                    progress.advance(task)
    ratios = {
        other: {
            tokens: round(statistics.median(a / b for a, b in zip(of["two streams"], of[other], strict=True)), 3)
            for tokens, of in times.items()
        }
        for other in ("plain", "plain with adapters")
    }
    write("icarus.prompts", console, vars(args), {f"to_{name.replace(' ', '_')}": of for name, of in ratios.items()},
          file="icarus_prompts", seconds=times)  # fmt: skip


if __name__ == "__main__":
    main()
