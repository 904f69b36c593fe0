"""What N models that take turns need, shared against each for itself: by simulation, for GPUs that are not here.

    python -m benchmarks.agents.plan [--preset papers] [--agents 2 4 8] [--at-once 4 8 16 32 64] [--sessions 200]

Every mode gets the same replicas, the same KV memory and the same sessions. Per number of agents and load (sessions under way,
closed loop): throughput, p95 latency of a session, hit ratio; and the ratios to mode `none`, where every agent's context is its
own. The last line is JSON.

The costs of preset `papers` are worked out from data sheets (below, each with its source), not measured: the papers measured on
A100, which this project has not run on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from benchmarks.agents.measures import Objective, summary
from benchmarks.agents.simulation import Costs, Simulation, Site
from benchmarks.agents.workload import PATTERNS, Scale, sessions
from benchmarks.small import bars
from kvshare.modes import get_mode

MODES = ("none", "prefillshare", "icarus")
#: Figures that are shown.
SHOWN = ("turns_per_s", "session_s_p95", "hit_ratio")


@dataclass(frozen=True)
class Preset:
    """`what`: where its figures come from."""

    what: str
    costs: Costs
    site: Site
    scale: str


#: Llama-3.1-8B in bfloat16: 16 GFLOP and 131,072 bytes of KV a token, 16 GB of weights.
_FLOP, _KV_BYTES, _WEIGHTS = 16e9, 131_072, 16e9
PRESETS = {
    "papers": Preset(
        what="Llama-3.1-8B on A100-80G: 312 TFLOP/s of which half is reached at prefill, 2.0 TB/s of which 0.8 at decode (data "
        "sheet, usual shares); 25 GB/s between GPUs; 48 GiB of KV each. ICaRus' second stream: 1.03 (benchmarks.icarus_shapes)",
        costs=Costs(
            prefill_s=0.01,
            prefill_token_s=_FLOP / (0.5 * 312e12),
            prefill_token_context_s=4 * 32 * 4096 / (0.5 * 312e12),
            step_s=_WEIGHTS / (0.8 * 2.0e12),
            step_request_s=_FLOP / (0.5 * 312e12),
            step_context_token_s=_KV_BYTES / (0.8 * 2.0e12),
            kv_bytes=_KV_BYTES,
            link_bytes_per_s=25e9,
            second_stream=1.03,
        ),
        site=Site(prefill=1, decode=1, kv_tokens=(48 << 30) // _KV_BYTES, max_running=256, block=16),
        scale="papers",
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", choices=PRESETS, default="papers", help="model, GPUs and lengths (default: papers)")
    parser.add_argument("--pattern", choices=PATTERNS, default="react", help="of the sessions (default: react)")
    parser.add_argument("--agents", type=int, nargs="+", default=[2, 4, 8], help="numbers of models (default: 2 4 8)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="sessions under way")
    parser.add_argument("--sessions", type=int, default=200, help="sessions played (default: 200)")
    parser.add_argument("--prefill", type=int, help="prefill GPUs (default: the preset's)")
    parser.add_argument("--decode", type=int, help="decode GPUs (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console, preset = Console(stderr=True), PRESETS[args.preset]
    site = replace(preset.site, prefill=args.prefill or preset.site.prefill, decode=args.decode or preset.site.decode)
    console.print(preset.what)
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    with bars(console) as progress:
        task = progress.add_task("simulations", total=len(args.agents) * len(args.at_once) * len(MODES))
        for agents in args.agents:
            played = sessions(args.pattern, args.sessions, agents, args.seed, Scale.named(preset.scale))
            for load in args.at_once:
                for mode in MODES:
                    records = Simulation(mode, site, preset.costs).run(played, at_once=load)
                    figures = summary(records, Objective(1.0, 0.1))
                    seen = {name: figures[name]["value"] for name in SHOWN}
                    found.setdefault(str(agents), {}).setdefault(str(load), {})[mode] = seen
                    progress.advance(task)
    for agents, by_load in found.items():
        console.print(_table(agents, by_load))
    print(json.dumps(found))


def _table(agents: str, by_load: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table("at once", "mode", "turns/s", "p95 of a session, s", "hit ratio", "throughput to none", "p95 to none",
                  title=f"{agents} models")  # fmt: skip
    for load, modes in by_load.items():
        own = modes["none"]
        for mode, seen in modes.items():
            ratios = ["", ""]
            if get_mode(mode).shares_prefill:
                faster, sooner = seen["turns_per_s"] / own["turns_per_s"], own["session_s_p95"] / seen["session_s_p95"]
                ratios = [f"x{faster:.2f}", f"/{sooner:.2f}"]
            table.add_row(load, mode, f"{seen['turns_per_s']:.2f}", f"{seen['session_s_p95']:.1f}",
                          f"{100 * seen['hit_ratio']:.1f} %", *ratios)  # fmt: skip
    return table


if __name__ == "__main__":
    main()
