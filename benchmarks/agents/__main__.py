"""What sharing is worth to agents that take turns over one context: our modes, the per-model baseline and stock vLLM, with the
same budget and the same requests.

    python -m benchmarks.agents [--short] [--systems prefillshare none ...] [--sessions N]
    python -m benchmarks.agents --pattern reflexion --agents 3 --per-s 0.05     (or --trace FILE; --at-once N)

Each system is started once and plays all experiments (benchmarks/agents/experiments.py) after a warm-up that does not count.
For our modes the costs of prefill, steps and transfers are measured too (not in the short form), and the same sessions are
simulated with these costs; this shows how far the simulation, on which benchmarks.agents.plan bases its answers for other
machines, is from what was measured. A system's results are kept in runs/agents: a run that was ended goes on when it is started
again at the same revision with the same arguments. Results: agents.json, a report agents.md and plots in benchmarks/results/.
The last line is JSON: ratios to the baselines; more than 1 is better.

`--one-engine`: one engine of ours, without a prefill pool, against one of stock vLLM; results agents_one_engine.*.
`--spare-core`: the same, few models, with a core to spare beside the engine; results agents_spare_core.*.
`--decider`: with a prefill pool, who makes a prompt's KV decided per turn, or always the same; results agents_decider.*.
`--short --repeats 1`: two experiments, about ten minutes (`make bench`); results agents_short.*. Results of an experiment of
your own: agents_own.*. The full form takes about an hour and a half on two cores, which should do nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.agents import costs, driver, experiments, report
from benchmarks.agents.experiments import Experiment
from benchmarks.agents.measures import Objective, summary
from benchmarks.agents.simulation import Simulation, Site
from benchmarks.agents.systems import BASELINES, DECIDED, OWN_LAYERS, RANK, SYSTEMS, UNIFIED, Budget, Running
from benchmarks.agents.workload import PATTERNS, Scale, sessions
from benchmarks.overhead.systems import BOTH_CORES, DECODE_CORES, PREFILL_CORES
from benchmarks.shared.environment import revision
from benchmarks.shared.result import write
from benchmarks.shared.small import BLOCK, MODEL, bars
from prefillshare.kvshare.contract import KVShape
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.modes import get_mode
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters

KEPT = Path("runs/agents")
#: Seed of the warm-up, whose sessions are in no experiment.
WARM_UP_SEED = 10_000
OBJECTIVE = Objective(ttft_s=5.0, inter_token_s=0.4)


def played(system: Running, experiment: Experiment, seed: int, scale: Scale, advance) -> list[driver.TurnRecord]:
    of, texts = experiment.played(seed, scale), f"{experiment.name} {seed}"  # no experiment finds another's contexts cached
    if experiment.at_once:
        return driver.closed(of, system.converse, experiment.at_once, texts, advance)
    return driver.opened(of, system.converse, texts, advance)


def figures(system: Running, experiment: Experiment, repeats: int, scale: Scale, progress: Progress) -> dict:
    """Figures of all repeats together; each repeat has other sessions."""
    lengths = [len(session.turns) for seed in range(repeats) for session in experiment.played(seed, scale)]
    task = progress.add_task(experiment.name, total=sum(lengths))
    before = system.counters()
    records = [played(system, experiment, seed, scale, lambda: progress.advance(task)) for seed in range(repeats)]
    progress.remove_task(task)
    counted = {name: count - before.get(name, 0) for name, count in system.counters().items()}
    return summary(records, OBJECTIVE) | counted


def simulated(mode: str, of: costs.Measured, budget: Budget, experiment: Experiment, repeats: int, scale: Scale) -> dict:
    kv_tokens = int(budget.kv_gib / 2 * 2**30) // of.costs.kv_bytes
    site = Site(prefill=1, decode=1, kv_tokens=kv_tokens, block=BLOCK)
    runs = (Simulation(mode, site, of.costs).run(experiment.played(seed, scale), experiment.at_once) for seed in range(repeats))
    return summary(list(runs), OBJECTIVE)


def of_system(name: str, model: Path, adapters, budget: Budget, chosen: list[Experiment], args, console, progress) -> dict:
    """Experiment -> figures; for our systems also "costs" and "simulated"."""
    scale = Scale.named("small")
    starting = progress.add_task(f"{name}: starting", total=None)
    with SYSTEMS[name](model, adapters, budget) as system:
        progress.update(starting, description=f"{name}: warm-up")
        warm = sessions("react", 2, len(adapters), WARM_UP_SEED, scale)
        driver.closed(warm, system.converse, 2, WARM_UP_SEED)
        progress.remove_task(starting)
        found: dict = {"experiments": {}}
        for experiment in chosen:
            seen = found["experiments"][experiment.name] = figures(system, experiment, args.repeats, scale, progress)
            shown = {what: seen[what]["value"] for what in report.SHOWN}
            console.print(f"{name}, {experiment.name}: {shown}")
        if system.client and not (args.short or args.decider):
            task = progress.add_task(f"{name}: costs", total=costs.MEASUREMENTS)
            recomputed = len(LayerGroup.parse(OWN_LAYERS)) / KVShape.of(model).layers if get_mode(name).recomputes else 0.0
            of = costs.measured(system, list(adapters), KVShape.of(model), recomputed, lambda: progress.advance(task))
            found["costs"] = asdict(of)
    if "costs" in found:
        found["simulated"] = {e.name: simulated(name, of, budget, e, args.repeats, scale) for e in chosen}
    return found


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agents",
        description=__doc__.split("\n\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="two experiments only")
    form.add_argument(
        "--one-engine", action="store_true", help="one engine of ours against one of stock vLLM, at high loads"
    )
    form.add_argument(
        "--spare-core", action="store_true", help="as --one-engine, few models; the engine computes on one core only"
    )
    form.add_argument(
        "--decider", action="store_true", help="with a prefill pool: the router's decision per turn against both fixed policies"
    )
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=argparse.SUPPRESS, help="what is compared (default: all of the form)"
    )
    parser.add_argument("--sessions", type=int, default=6, help="of the larger experiments")
    parser.add_argument("--repeats", type=int, default=2, help="of each experiment, with other sessions")
    parser.add_argument("--kv-gib", type=float, default=1.5, help="KV memory of a system, over all its engines")
    one = parser.add_argument_group("one experiment of your own instead")
    one.add_argument("--pattern", choices=PATTERNS, help="of its sessions")
    one.add_argument("--trace", type=Path, help="a file with its sessions (format: benchmarks/agents/workload.py)")
    one.add_argument("--agents", type=int, default=4, help="number of models")
    one.add_argument("--at-once", type=int, help="sessions under way")
    one.add_argument("--per-s", type=float, help="sessions that arrive a second")
    one.add_argument("--bursts", action="store_true", help="they arrive in bursts")
    args = parser.parse_args()
    console, own = Console(stderr=True), args.trace or args.pattern
    budget = Budget(args.kv_gib, DECODE_CORES if args.spare_core else BOTH_CORES)
    of_form = list(SYSTEMS)
    if args.one_engine or args.spare_core:
        of_form = [*UNIFIED, "vllm"]
    elif args.decider:
        of_form = list(DECIDED.values())
    args.systems = getattr(args, "systems", of_form)
    if own and not (args.trace or args.at_once or args.per_s):
        parser.error("argument --pattern: needs a load, --at-once or --per-s")
    if own:
        file = "agents_own"
        chosen = [Experiment(args.pattern or "trace", args.agents, args.sessions, args.at_once, args.per_s, args.bursts,
                             args.trace)]  # fmt: skip
    elif args.short:
        file, chosen = "agents_short", experiments.short(args.sessions)
    elif args.one_engine:
        file, chosen = "agents_one_engine", experiments.one_engine(args.sessions)
    elif args.spare_core:
        file, chosen = "agents_spare_core", experiments.few_models(args.sessions)
    elif args.decider:
        file, chosen = "agents_decider", experiments.decider(args.sessions)
    else:
        file, chosen = "agents", experiments.full(args.sessions)
    for experiment in chosen:
        experiment.played(0, Scale.named("small"))  # a wrong trace is refused before anything is started
    model, found = fetch(MODEL), {}
    with tempfile.TemporaryDirectory() as folder, bars(console) as progress:
        names = tuple(f"agent-{n}" for n in range(max(experiment.agents for experiment in chosen)))
        modules = get_mode("icarus").adapter_modules  # those that every mode can serve
        adapters = make_seeded_adapters(model, folder, names, RANK, modules)
        bar = progress.add_task("systems", total=len(args.systems))
        for name in args.systems:
            kept = KEPT / f"{name}-{_digest(revision(), budget, chosen, args.repeats, Scale.named('small'))}.json"
            if not kept.is_file():
                made = of_system(name, model, adapters, budget, chosen, args, console, progress)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(made))
            found[name] = json.loads(kept.read_text())
            progress.advance(bar)
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    config |= {
        "experiments": [e.name for e in chosen], "scale": asdict(Scale.named("small")), "objective": asdict(OBJECTIVE),
        "budget": {
            "kv_gib": budget.kv_gib, "prefill_cores": PREFILL_CORES, "decode_cores": DECODE_CORES,
            "one_engine_cores": budget.one_engine_cores,
        },
        "own_layers": OWN_LAYERS, "adapter_rank": RANK, "block": BLOCK,
    }  # fmt: skip
    baselines = [baseline for baseline in BASELINES if baseline in found]
    headline = report.headline(found, baselines)
    unified = report.unified_vs_vllm(found)
    headline |= {"unified_vs_vllm": unified["throughput"], "unified_vs_vllm_p95": unified["p95"]}
    headline["auto_vs_better"] = report.auto_vs_better(found)
    result = write("agents", console, config, headline, file=file, systems=found)
    report.write(result, file)


if __name__ == "__main__":
    main()
