"""Do our load generator and another project's measure the same? One scenario over the OpenAI surface, with guidellm and ours.

    uv tool install guidellm                  (an environment of its own: it brings its own torch)
    python -m benchmarks.agents.crosscheck [--guidellm guidellm] [--prompt 512] [--answer 32] [--at-once 4] [--requests 24]

One decoder of a system in mode prefillshare gets the same number of prompts of the same length, with the same number at once
(closed loop), from ours, from guidellm, and from ours again. The figures that all three report are compared: time to the first
token, time between tokens, requests a second. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.agents.systems import RANK, Budget, deployment
from benchmarks.overhead.surfaces import Http
from benchmarks.shared import load
from benchmarks.shared.result import write
from benchmarks.shared.small import HTTP_PORT, MODEL, VOCABULARY
from prefillshare.app import running
from prefillshare.kvshare.errors import ConfigError
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters

URL, DECODER, LIMIT_S = f"http://127.0.0.1:{HTTP_PORT}", "agent-0", 900.0


def by_ours(args: argparse.Namespace, *seed: object) -> dict[str, float]:
    async def run():
        surface = Http(URL, DECODER)
        try:
            return await load.run(
                surface, load.prompts(args.requests, args.prompt, VOCABULARY, *seed), args.at_once, args.answer
            )
        finally:
            await surface.close()

    samples = asyncio.run(run())
    ended = max(sample.arrivals[-1][0] for sample in samples)
    return {
        "ttft_p50_s": round(statistics.median(sample.ttft_s for sample in samples), 4),
        # As guidellm computes it: from the mean of each request.
        "inter_token_p50_s": round(statistics.median(statistics.fmean(s.inter_token_s()) for s in samples), 4),
        "requests_per_s": round(len(samples) / (ended - min(sample.started for sample in samples)), 4),
        "prompt_tokens": float(args.prompt),
    }


def by_guidellm(tool: str, model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Figures measured by guidellm. Raises RuntimeError with the end of its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [
            tool, "run", "--disable-console-interactive",
            "--backend", f"kind=openai_http,target={URL},model={DECODER},request_format=/v1/completions",
            "--profile", f"kind=concurrent,streams={args.at_once}",
            "--constraint", f"kind=max_requests,count={args.requests}",
            "--tokenizer", f"kind=huggingface_auto,model={model.resolve()}",
            "--data", f"kind=synthetic_text,prompt_tokens={args.prompt},output_tokens={args.answer}",
            "--output", f"kind=json,path={file}",
        ]  # fmt: skip
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=offline)
        if done.returncode or not file.is_file():
            raise RuntimeError(f"guidellm ended with {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
        return figures_of(json.loads(file.read_text()), args.requests)


def figures_of(report: dict, requests: int) -> dict[str, float]:
    """Figures of guidellm's report. Raises RuntimeError unless all requests succeeded."""
    (benchmark,) = report["benchmarks"]
    metrics = benchmark["metrics"]
    seen = {name: metrics[name]["successful"] for name in ("time_to_first_token_ms", "inter_token_latency_ms")}
    if (well := metrics["request_latency"]["successful"]["count"]) != requests:
        raise RuntimeError(f"guidellm: {well} of {requests} requests went well")
    return {
        "ttft_p50_s": round(seen["time_to_first_token_ms"]["median"] / 1000, 4),
        "inter_token_p50_s": round(seen["inter_token_latency_ms"]["median"] / 1000, 4),
        "requests_per_s": round(well / benchmark["duration"], 4),
        "prompt_tokens": metrics["prompt_token_count"]["successful"]["mean"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agents.crosscheck",
        description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--guidellm", default="guidellm", help="the program, or its path")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--at-once", type=int, default=4, help="requests under way")
    parser.add_argument("--requests", type=int, default=24, help="requests in all")
    args = parser.parse_args()
    if (tool := shutil.which(args.guidellm)) is None:
        raise ConfigError(f"no program {args.guidellm!r}", field="--guidellm", fix="install it: uv tool install guidellm")
    console, model, found = Console(stderr=True), fetch(MODEL), {}
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_seeded_adapters(model, folder, (DECODER,), RANK)
        with running(deployment("prefillshare", model, adapters, Budget(kv_gib=1.0))):
            by_ours(argparse.Namespace(**vars(args) | {"requests": args.at_once}), "warm-up")
            found["ours"] = by_ours(args, 1)
            console.print(f"ours: {found['ours']}")
            found["guidellm"] = by_guidellm(tool, model, args)
            console.print(f"guidellm: {found['guidellm']}")
            found["ours again"] = by_ours(args, 2)
            console.print(f"ours again: {found['ours again']}")
    headline = {}
    for what in ("ttft_p50_s", "inter_token_p50_s", "requests_per_s"):
        mean = statistics.mean((found["ours"][what], found["ours again"][what]))
        headline[f"guidellm to ours, {what}"] = round(found["guidellm"][what] / mean, 3)
        headline[f"ours again to ours, {what}"] = round(found["ours again"][what] / found["ours"][what], 3)
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=60).stdout.split()[-1]
    write("agents.crosscheck", console, vars(args) | {"guidellm": version}, headline, file="crosscheck", tools=found)


if __name__ == "__main__":
    main()
