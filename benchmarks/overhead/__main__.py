"""What our path costs: a bare engine, stock vLLM prefill + decode, and our system over gRPC and HTTP, in one run.

    python -m benchmarks.overhead [--quick] [--concurrency 1,8,32] [--only bare,stock_pd,ours]

Every system is started, warmed up, measured `--repeats` times and stopped before the next one starts; all get the same
model, engine arguments, cores and kind of prompts. The last line of output is one JSON object with the ratios.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks.overhead.measure import Plan
from benchmarks.overhead.report import console_table, markdown
from benchmarks.overhead.systems import BOTH_CORES, DECODE_CORES, ENGINE, KV_GIB, PREFILL_CORES, SYSTEMS
from benchmarks.shared import children, environment, load
from prefillshare.platform import versions

RESULTS = Path("benchmarks/results")
#: Systems measured by default. The others, if --only names them, prolong the run from 11 to 14 minutes on two cores.
DEFAULT = ("bare", "stock_pd", "ours")
MODEL = "models/smollm2-135m-instruct"


def main() -> None:
    given = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes are ended on the way out
    console = Console(stderr=True)
    plan = Plan(
        model=given.model, concurrency=given.concurrency, turns=given.turns, prompt_tokens=given.prompt_tokens,
        output_tokens=given.output_tokens, repeats=given.repeats,
    )
    began = time.monotonic()
    systems, failed = {}, []
    for name in given.only:
        try:
            systems[name] = _run(name, plan, given.limit_s, console, began)
        except (RuntimeError, TimeoutError) as error:
            failed.append(name)
            console.print(f"{name} failed: {error}", style="red", markup=False)
    result = {
        "benchmark": "overhead",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.overhead", *sys.argv[1:]]),
        "took_s": round(time.monotonic() - began),
        "revision": environment.revision(),
        "hardware": environment.hardware(),
        "versions": versions(),
        "config": {
            "model": given.model, "engine": ENGINE, "kv_cache_gib": {"prefill": KV_GIB, "decode": KV_GIB, "bare": 2 * KV_GIB},
            "cores": {"prefill": PREFILL_CORES, "decode": DECODE_CORES, "bare": BOTH_CORES},
            "prompt_tokens": plan.prompt_tokens, "output_tokens": plan.output_tokens,
            "repeats": plan.repeats, "seed": plan.seed,
            "turns": {str(c): plan.turns_at(c) for c in plan.concurrency},
        },
        "summary": summary(systems, plan.concurrency),
        "systems": systems,
    }
    console.print(console_table(result))
    if given.out and not failed:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "overhead.json").write_text(json.dumps(_rounded(result), indent=1) + "\n")
        (given.out / "overhead.md").write_text(markdown(result))
        console.print(f"written: {given.out / 'overhead.json'}, {given.out / 'overhead.md'}")
    print(json.dumps(_rounded(result["summary"] | ({"failed": failed} if failed else {}))))
    sys.exit(1 if failed else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="folder of the model every engine runs")
    parser.add_argument("--concurrency", type=_numbers, default=(1, 8, 32), help="turns at a time, like 1,8,32")
    parser.add_argument("--turns", type=int, help="turns of one measurement; at least as many as run at a time")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, help="measurements of each kind in a system's life")
    parser.add_argument("--only", type=_systems, default=DEFAULT, help=f"some of {', '.join(SYSTEMS)}")
    parser.add_argument("--limit-s", type=float, default=420, help="most seconds one system may take")
    parser.add_argument("--quick", action="store_true", help="few turns, one repeat: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, help=f"folder of the results; default, for a full run: {RESULTS}")
    given = parser.parse_args()
    given.turns = given.turns or (3 if given.quick else 5)
    given.repeats = given.repeats or (1 if given.quick else 3)
    if given.out is None and not given.quick and set(given.only) >= set(DEFAULT):
        given.out = RESULTS
    if not (Path(given.model) / "config.json").is_file():
        parser.error(f"--model: {given.model} is not a model's folder; make the default one with `make model`")
    if min(given.prompt_tokens, given.output_tokens) < 2 or given.prompt_tokens + given.output_tokens > ENGINE["max_model_len"]:
        parser.error(f"prompt and output take at least 2 tokens each, and at most {ENGINE['max_model_len']} together")
    return given


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted({int(part) for part in text.split(",")}))
    if numbers[0] < 1 or numbers[-1] > ENGINE["max_num_seqs"]:
        raise argparse.ArgumentTypeError(f"{text}: use numbers from 1 to {ENGINE['max_num_seqs']}")
    return numbers


def _systems(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if unknown := set(names) - set(SYSTEMS):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; use some of {', '.join(SYSTEMS)}")
    return tuple(name for name in SYSTEMS if name in names)


def _run(system: str, plan: Plan, limit_s: float, console: Console, began: float) -> dict[str, object]:
    """Measure a system: {"start_s", "surfaces": {name: {concurrency: {"figures", "cpu_s_per_turn"}}}}, over repeats."""
    command = [sys.executable, "-m", "benchmarks.overhead.measure", system, plan.as_json()]
    found: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    start_s, stage = 0.0, ""
    with console.status(system) as status:
        def tick() -> None:
            status.update(f"{time.monotonic() - began:4.0f} s  {system}: {stage}")

        for event in children.events(command, limit_s, tick):
            if event["event"] == "stage":
                stage = event["text"]
            elif event["event"] == "started":
                start_s = event["start_s"]
                console.print(f"{time.monotonic() - began:4.0f} s  {system}: started in {start_s:.0f} s")
            elif event["event"] == "figures":
                found[event["surface"]][str(event["concurrency"])].append(event)
                f, others = event["figures"], event["cpu_s_per_turn"]["everybody else"] * event["figures"]["turns"]
                console.print(
                    f"{time.monotonic() - began:4.0f} s  {system}: {stage}: {f['tokens_per_s']:.1f} tokens/s, "
                    f"TTFT {f['ttft_p50_ms']:.0f} ms, ITL {f['itl_p50_ms']:.1f} ms; {f['wall_s']:.1f} s, "
                    f"in which others used {others:.1f} CPU s"
                )
    return {
        "start_s": start_s,
        "surfaces": {
            name: {
                concurrency: {
                    "figures": load.over_repeats([run["figures"] for run in runs]),
                    "cpu_s_per_turn": load.over_repeats([_every(run["cpu_s_per_turn"], runs) for run in runs]),
                }
                for concurrency, runs in by_concurrency.items()
            }
            for name, by_concurrency in found.items()
        },
    }


def _every(cpu_s: dict[str, float], runs: list[dict]) -> dict[str, float]:
    """CPU seconds of one repeat, with zeros for roles that only other repeats saw."""
    roles = dict.fromkeys(role for run in runs for role in run["cpu_s_per_turn"])
    return {role: cpu_s.get(role, 0.0) for role in roles}


def summary(systems: dict[str, dict], concurrency: tuple[int, ...]) -> dict[str, float]:
    """Ratios of medians over repeats, ours divided by theirs. A ratio is left out if one side was not measured."""
    low, high = str(min(concurrency)), str(max(concurrency))

    def figure(system: str, surface: str, at: str, name: str) -> float | None:
        try:
            return systems[system]["surfaces"][surface][at]["figures"][name]["median"]
        except KeyError:
            return None

    found: dict[str, float | None] = {}
    for system, surface in (("stock_pd", "http"), ("stock_pd_one_process", "http"), ("bare", "in process")):
        for mine, suffix in (("grpc", ""), ("http", "_http")):
            ours_, theirs = figure("ours", mine, high, "tokens_per_s"), figure(system, surface, high, "tokens_per_s")
            found[f"throughput_ratio_vs_{system}{suffix}"] = _ratio(ours_, theirs)
    for system, of in (("stock_pd", ""), ("stock_pd_one_process", "_vs_one_process")):
        for mine, suffix in (("grpc", ""), ("http", "_http")):
            ours_, theirs = figure("ours", mine, low, "ttft_p50_ms"), figure(system, "http", low, "ttft_p50_ms")
            found[f"ttft_overhead_ms{of}{suffix}"] = None if None in (ours_, theirs) else ours_ - theirs
            found[f"ttft_ratio{of}{suffix}"] = _ratio(ours_, theirs)
            ours_, theirs = figure("ours", mine, low, "itl_p50_ms"), figure(system, "http", low, "itl_p50_ms")
            found[f"itl_ratio{of}{suffix}"] = _ratio(ours_, theirs)
    return {"concurrency_low": int(low), "concurrency_high": int(high)} | {k: v for k, v in found.items() if v is not None}


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else ours / theirs


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
