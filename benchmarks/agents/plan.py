"""What N models that take turns need, with shared caches against one cache per model: simulated, for machines not at hand.

    python -m benchmarks.agents.plan                                 the papers' set-up, beside the papers' figures
    python -m benchmarks.agents.plan --preset thousand               1,000 replicas
    python -m benchmarks.agents.plan --agents 8 --per-s 2            how many GPUs 8 models need for 2 sessions a second
    python -m benchmarks.agents.plan --costs agents                  costs as benchmarks.agents measured them here

Every mode gets the same replicas, the same KV memory and the same sessions. Reported for each number of models and each load
(sessions under way, closed loop): throughput, p95 latency of a session, hit ratio, and the ratios to mode `none`, in which
every model has its own context. `--prefill 0`: replicas compute prompts themselves; mode `none` is then stock vLLM with an
adapter per model. With `--per-s`: a small number of replicas of each kind, and of replicas that compute prompts themselves,
with which `--good` of the sessions meet the objective; play as many sessions as arrive in some minutes, since a short burst
needs fewer. Results: plan.json in benchmarks/results/ for a preset as it is, else plan_own.json (with --costs NAME:
plan_NAME.json; with --per-s: plan_need.json). The last line is JSON.

The costs of the presets are derived from data sheets, each with its source, not measured: the papers measured on A100, on which
this project has not run. benchmarks.agents says how far apart simulation and measurement are with measured costs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from benchmarks.agents.driver import TurnRecord
from benchmarks.agents.measures import Objective, share_good, summary
from benchmarks.agents.simulation import Costs, Simulation, Site
from benchmarks.agents.workload import PATTERNS, Scale, Session, poisson, sessions
from benchmarks.shared.result import RESULTS, write
from benchmarks.shared.small import BLOCK, bars
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.modes import get_mode

MODES = ("none", "prefillshare", "icarus", "droidspeak")
#: Figures that are shown.
SHOWN = ("turns_per_s", "session_s_p95", "hit_ratio")
#: The papers' gains against one cache per model: mode -> models -> (throughput, p95), as factors. PrefillShare's are "up to"
#: values, with four models, on ReAct.
PUBLISHED = {
    "prefillshare": {"4": (3.6, 3.9)},
    "icarus": {"2": (1.4, 3.8), "4": (2.3, 5.1), "8": (3.8, 11.1)},
}
#: Most replicas that are tried for a rate.
MOST_REPLICAS = 64


@dataclass(frozen=True)
class Preset:
    """`what`: where its figures come from. `costs`: mode -> costs, for modes whose costs differ; "" for the others."""

    what: str
    costs: dict[str, Costs]
    site: Site
    scale: str
    at_once: tuple[int, ...]
    sessions: int = 200

    def of(self, mode: str) -> Costs:
        return self.costs.get(mode, self.costs[""])


#: Llama-3.1-8B in bfloat16: 16 GFLOP and 131,072 bytes of KV a token, 16 GB of weights.
_FLOP, _KV_BYTES, _WEIGHTS = 16e9, 131_072, 16e9
_A100 = Costs(
    prefill_s=0.01,
    prefill_token_s=_FLOP / (0.5 * 312e12),
    prefill_token_context_s=4 * 32 * 4096 / (0.5 * 312e12),
    step_s=_WEIGHTS / (0.8 * 2.0e12),
    step_request_s=_FLOP / (0.5 * 312e12),
    step_context_token_s=_KV_BYTES / (0.8 * 2.0e12),
    kv_bytes=_KV_BYTES,
    link_bytes_per_s=25e9,
    second_stream=1.03,
    own_layers=0.125,
)
_SHEET = (
    "Llama-3.1-8B on A100-80G: 312 TFLOP/s of which half is reached at prefill, 2.0 TB/s of which 0.8 at decode (data sheet, "
    "usual shares); 25 GB/s between GPUs; 48 GiB of KV each. ICaRus' second stream: 1.03 (benchmarks.icarus.shapes); "
    "DroidSpeak: 4 of 32 layers"
)
_SITE = Site(prefill=1, decode=1, kv_tokens=(48 << 30) // _KV_BYTES, max_running=256, block=16)
PRESETS = {
    "papers": Preset(_SHEET, {"": _A100}, _SITE, "papers", (4, 8, 16, 32, 64)),
    "thousand": Preset(
        f"1,000 replicas of {_SHEET}", {"": _A100}, replace(_SITE, prefill=400, decode=600), "papers", (8000,), sessions=8000
    ),
}


def measured(name: str) -> Preset:
    """A preset with the costs in benchmarks/results/NAME.json, which benchmarks.agents measured. Raises ConfigError."""
    file = RESULTS / f"{name}.json"
    try:
        result = json.loads(file.read_text())
        costs = {mode: Costs(**of["costs"]["costs"]) for mode, of in result["systems"].items() if "costs" in of}
        kv_gib = result["config"]["budget"]["kv_gib"] / 2
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "make it: python -m benchmarks.agents"
        raise ConfigError(f"{file} has no measured costs: {error!r}", field="--costs", fix=fix) from None
    if not costs:
        raise ConfigError(f"{file} has no measured costs", field="--costs", fix="measure one of our modes")
    if "none" not in costs:
        raise ConfigError(f"{file} has no costs of mode none, which all are compared with", field="--costs",
                          fix="measure it, too: python -m benchmarks.agents")  # fmt: skip
    of_all = costs.get("prefillshare", costs["none"])
    site = Site(prefill=1, decode=1, kv_tokens=int(kv_gib * 2**30) // of_all.kv_bytes, block=BLOCK)
    what = f"costs as {result['command']} measured them on {result['hardware']['cpu']}, {result['hardware']['cores']} cores"
    return Preset(what, costs | {"": of_all}, site, "small", (1, 2, 4, 8, 16), sessions=60)


def _share(
    mode: str, preset: Preset, played: Sequence[Session], objective: Objective, prefill: int, decode: int
) -> float:
    """The share of the sessions that is good with so many replicas of each kind."""
    site = replace(preset.site, prefill=prefill, decode=decode)
    return share_good(Simulation(mode, site, preset.of(mode)).run(played), objective)


def need_in_place(mode: str, preset: Preset, played: Sequence[Session], objective: Objective, good: float, advance):
    """As `need`, of replicas that compute prompts themselves: the smallest number."""
    for replicas in range(1, MOST_REPLICAS + 1):
        advance()
        reached = _share(mode, preset, played, objective, 0, replicas)
        if reached >= good:
            return {"prefill": 0, "decode": replicas, "good": round(reached, 4)}
    return None


def need(mode: str, preset: Preset, played: Sequence[Session], objective: Objective, good: float, advance) -> dict | None:
    """A small number of prefill and decode replicas with which a share `good` of the sessions is good; None if MOST_REPLICAS do
    not suffice.

    Replicas are added one at a time, of the kind that helps more, until they suffice; then those that are not needed are
    removed again. One replica less of either kind would not do, but another mix of as many might.
    """

    def share(prefill: int, decode: int) -> float:
        advance()
        return _share(mode, preset, played, objective, prefill, decode)

    prefill = decode = 1
    reached = share(1, 1)
    while reached < good:
        if prefill + decode >= MOST_REPLICAS:
            return None
        more, other = share(prefill + 1, decode), share(prefill, decode + 1)
        if max(more, other) <= reached:  # both kinds are short
            prefill, decode, reached = prefill + 1, decode + 1, share(prefill + 1, decode + 1)
        elif more >= other:
            prefill, reached = prefill + 1, more
        else:
            decode, reached = decode + 1, other
    while prefill > 1 and share(prefill - 1, decode) >= good:
        prefill -= 1
    while decode > 1 and share(prefill, decode - 1) >= good:
        decode -= 1
    return {"prefill": prefill, "decode": decode, "good": round(share(prefill, decode), 4)}


def seen(records: Sequence[TurnRecord], objective: Objective) -> dict[str, float]:
    figures = summary([records], objective, resamples=0)
    return {name: figures[name]["value"] for name in SHOWN}


def against_none(found: dict) -> dict[str, dict]:
    """Mode -> models -> the best ratios to `none` at any load, and the published ones. p95: the factor by which it is lower."""
    compared: dict[str, dict] = {}
    for agents, by_load in found.items():
        for mode in MODES[1:]:
            pairs = [(modes["none"], modes[mode]) for modes in by_load.values() if mode in modes]
            if not pairs:
                continue
            published = PUBLISHED.get(mode, {}).get(agents, (None, None))
            compared.setdefault(mode, {})[agents] = {
                "throughput": round(max(own["turns_per_s"] / none["turns_per_s"] for none, own in pairs), 2),
                "p95": round(max(none["session_s_p95"] / own["session_s_p95"] for none, own in pairs), 2),
                "published_throughput": published[0],
                "published_p95": published[1],
            }
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agents.plan",
        description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="papers", help="model, GPUs, lengths and loads")
    parser.add_argument("--costs", metavar="NAME", help="measured ones instead: of benchmarks/results/NAME.json")
    parser.add_argument("--pattern", choices=PATTERNS, default="react", help="of the sessions")
    parser.add_argument("--agents", type=int, nargs="+", help="numbers of models (default: 2 4 8; preset thousand: 8)")
    parser.add_argument("--at-once", type=int, nargs="+", help="sessions under way (default: the preset's)")
    parser.add_argument("--sessions", type=int, help="sessions played (default: the preset's)")
    parser.add_argument(
        "--prefill", type=int, help="prefill replicas (default: the preset's); 0: decode replicas compute prompts themselves"
    )
    parser.add_argument("--decode", type=int, help="decode replicas (default: the preset's)")
    parser.add_argument("--per-s", type=float, help="how many replicas are needed for so many sessions a second?")
    parser.add_argument("--good", type=float, default=0.95, help="with --per-s: the share of sessions that meet the objective")
    parser.add_argument("--ttft-s", type=float, default=1.0, help="objective: each turn's first token")
    parser.add_argument("--inter-token-s", type=float, default=0.1, help="objective: between tokens, on the mean")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console, preset = Console(stderr=True), measured(args.costs) if args.costs else PRESETS[args.preset]
    objective, count = Objective(args.ttft_s, args.inter_token_s), args.sessions or preset.sessions
    agents = args.agents or ([8] if args.preset == "thousand" else [2, 4, 8])
    modes = [mode for mode in MODES if not args.costs or mode in preset.costs]
    prefill = preset.site.prefill if args.prefill is None else args.prefill
    site = replace(preset.site, prefill=prefill, decode=args.decode or preset.site.decode)
    in_place = [mode for mode in modes if not get_mode(mode).recomputes]
    if not prefill:
        modes = in_place
    console.print(preset.what)
    scale, config = Scale.named(preset.scale), vars(args) | {"what": preset.what}
    with bars(console) as progress:
        if args.per_s:
            task = progress.add_task("simulations", total=None)
            needs: dict[str, dict] = {}
            for number in agents:
                arriving = poisson(sessions(args.pattern, count, number, args.seed, scale), args.per_s, args.seed)
                needs[str(number)] = {
                    mode: need(mode, preset, arriving, objective, args.good, lambda: progress.advance(task)) for mode in modes
                } | {
                    f"{mode}, one engine": need_in_place(
                        mode, preset, arriving, objective, args.good, lambda: progress.advance(task)
                    )
                    for mode in in_place
                }
        else:
            loads = args.at_once or preset.at_once
            task = progress.add_task("simulations", total=len(agents) * len(loads) * len(modes))
            found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
            for number in agents:
                played = sessions(args.pattern, count, number, args.seed, scale)
                for load in loads:
                    for mode in modes:
                        records = Simulation(mode, site, preset.of(mode)).run(played, at_once=load)
                        found.setdefault(str(number), {}).setdefault(str(load), {})[mode] = seen(records, objective)
                        progress.advance(task)
    if args.per_s:
        console.print(_needs(needs, args))
        write("agents.plan", console, config, needs, file="plan_need")
        return
    for number, by_load in found.items():
        console.print(_table(number, by_load))
    compared = against_none(found)
    console.print(_published(compared))
    as_it_is = (args.agents, args.at_once, args.sessions, args.prefill, args.decode) == (None,) * 5 and args.pattern == "react"
    file = f"plan_{args.costs}" if args.costs else "plan_own"
    if as_it_is and not args.costs:
        file = "plan" if args.preset == "papers" else f"plan_{args.preset}"
    write("agents.plan", console, config, compared, file=file, loads=found)


def _table(agents: str, by_load: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table("at once", "mode", "turns/s", "p95 of a session, s", "hit ratio", "throughput to none", "p95 to none",
                  title=f"{agents} models")  # fmt: skip
    for load, modes in by_load.items():
        own = modes["none"]
        for mode, shown in modes.items():
            ratios = ["", ""]
            if get_mode(mode).shares_prefill:
                faster, sooner = shown["turns_per_s"] / own["turns_per_s"], own["session_s_p95"] / shown["session_s_p95"]
                ratios = [f"x{faster:.2f}", f"/{sooner:.2f}"]
            table.add_row(load, mode, f"{shown['turns_per_s']:.2f}", f"{shown['session_s_p95']:.1f}",
                          f"{100 * shown['hit_ratio']:.1f} %", *ratios)  # fmt: skip
    return table


def _published(compared: dict[str, dict]) -> Table:
    table = Table("mode", "models", "throughput", "published", "p95", "published", title="against none, best at any load")
    for mode, by_agents in compared.items():
        for agents, ratios in by_agents.items():
            published = [ratios[f"published_{what}"] for what in ("throughput", "p95")]
            table.add_row(mode, agents, f"x{ratios['throughput']}", f"x{published[0]}" if published[0] else "",
                          f"/{ratios['p95']}", f"/{published[1]}" if published[1] else "")  # fmt: skip
    return table


def _needs(needs: dict[str, dict], args: argparse.Namespace) -> Table:
    table = Table("models", "mode", "prefill", "decode", "in all", "good sessions",
                  title=f"for {args.per_s:g} sessions a second, {args.good:.0%} of them good")  # fmt: skip
    for agents, by_mode in needs.items():
        for mode, found in by_mode.items():
            cells = [f"more than {MOST_REPLICAS}"] if found is None else [
                str(found["prefill"]), str(found["decode"]), str(found["prefill"] + found["decode"]), f"{found['good']:.1%}"
            ]  # fmt: skip
            table.add_row(agents, mode, *cells)
    return table


if __name__ == "__main__":
    main()
