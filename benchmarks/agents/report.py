"""The result of benchmarks.agents for people: a page of tables and its plots, generated and never edited."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.agents.experiments import LOADS, MODELS, OTHER_MODELS
from benchmarks.agents.systems import DECIDED, UNIFIED
from benchmarks.shared.result import RESULTS

#: Figures that tables show: name -> (title, factor, decimals).
SHOWN = {
    "turns_per_s": ("turns/s", 1, 2),
    "session_s_p50": ("session p50, s", 1, 1),
    "session_s_p95": ("session p95, s", 1, 1),
    "turn_s_p95": ("turn p95, s", 1, 2),
    "ttft_s_p50": ("TTFT p50, s", 1, 2),
    "ttft_s_p95": ("TTFT p95, s", 1, 2),
    "inter_token_s_p50": ("between tokens p50, ms", 1e3, 0),
    "good_sessions_per_s": ("good sessions/s", 1, 3),
    "hit_ratio": ("hit ratio, %", 100, 1),
    "computed_tokens_per_turn": ("prefilled per turn", 1, 0),
    "kv_bytes_per_turn": ("KV moved per turn, MB", 1e-6, 1),
}
#: Counts that tables show if a system reports them.
COUNTED = ("tokens_prefilled_ahead", "resumes", "wanted_kv_mb", "evicted_blocks", "preemptions", "failed_turns")
#: Figures in which simulation and measurement are compared.
COMPARED = ("turns_per_s", "session_s_p95", "hit_ratio")


def headline(systems: dict, baselines: Sequence[str]) -> dict[str, float]:
    """Ratios of our modes to the baselines, where more than 1 is better: of throughput, and inversely of a session's p95; and
    hit ratios."""
    found: dict[str, float] = {}
    for name, of in systems.items():
        if name in baselines:
            continue
        for experiment, own in of["experiments"].items():
            for baseline in baselines:
                other = systems[baseline]["experiments"][experiment]
                key = f"{name} to {baseline}, {experiment}"
                found[f"{key}: throughput"] = _ratio(own, other, "turns_per_s")
                found[f"{key}: p95"] = _ratio(other, own, "session_s_p95")
            found[f"{name}, {experiment}: hit ratio"] = own["hit_ratio"]["value"]
    for baseline in baselines:
        for experiment, own in systems[baseline]["experiments"].items():
            found[f"{baseline}, {experiment}: hit ratio"] = own["hit_ratio"]["value"]
    return found | {f"simulation error, {what}": error for what, error in simulation_errors(systems).items()}


def unified_vs_vllm(systems: dict) -> dict[str, dict[str, dict[str, float]]]:
    """One engine of ours against one of stock vLLM, at the highest of LOADS and at those in sessions a second: "throughput" and
    "p95" (times lower) -> workload ("react-4", "low-sharing", "react-8, 0.15/s") -> mode -> ratio."""
    found: dict[str, dict[str, dict[str, float]]] = {"throughput": {}, "p95": {}}
    if "vllm" not in systems:
        return found
    for experiment, other in systems["vllm"]["experiments"].items():
        pattern, models, load = experiment.rsplit(", ", 2)  # a trace file may have any name
        workload = f"{pattern}-{models.split()[0]}" if pattern == "react" else pattern
        if load.endswith("/s"):
            workload += f", {load}"
        elif load != f"{LOADS[-1]} at once":
            continue
        for name, mode in UNIFIED.items():
            if name in systems:
                own = systems[name]["experiments"][experiment]
                found["throughput"].setdefault(workload, {})[mode] = _ratio(own, other, "turns_per_s")
                found["p95"].setdefault(workload, {})[mode] = _ratio(other, own, "session_s_p95")
    return found


def auto_vs_better(systems: dict) -> dict[str, float]:
    """Experiment -> throughput where the router decides for each turn, relative to the better of the two fixed policies."""
    if not {*DECIDED.values()} <= systems.keys():
        return {}
    auto, *fixed = (systems[DECIDED[policy]]["experiments"] for policy in ("auto", "always", "never"))
    return {name: min(_ratio(own, of[name], "turns_per_s") for of in fixed) for name, own in auto.items()}


def simulation_errors(systems: dict) -> dict[str, float]:
    """Figure -> median over systems and experiments of |simulated - measured| / measured."""
    apart: dict[str, list[float]] = {what: [] for what in COMPARED}
    for of in systems.values():
        for experiment, simulated in of.get("simulated", {}).items():
            for what in COMPARED:
                real, made = of["experiments"][experiment][what]["value"], simulated[what]["value"]
                if real and made is not None:
                    apart[what].append(abs(made - real) / real)
    return {what: round(sorted(errors)[len(errors) // 2], 3) for what, errors in apart.items() if errors}


def _ratio(above: dict, below: dict, what: str) -> float:
    return round(above[what]["value"] / below[what]["value"], 2) if below[what]["value"] and above[what]["value"] else 0.0


def write(result: dict, name: str) -> None:
    plots = RESULTS / f"{name}.png"
    plot(result, plots)
    (RESULTS / f"{name}.md").write_text(markdown(result, plots.name))


def markdown(result: dict, plots: str) -> str:
    systems, config = result["systems"], result["config"]
    budget, objective = config["budget"], config["objective"]
    parts = [
        "# Agents that take turns over one context\n\n<!-- Made by `python -m benchmarks.agents`; change "
        "benchmarks/agents/report.py instead. -->\n\n"
        f"Every system gets the same budget ({budget['kv_gib']:g} GiB of KV memory over all engines, two cores; an engine that "
        f"is alone has core {budget['one_engine_cores']}), the same "
        "adapters and the same sessions; what the systems are: benchmarks/agents/systems.py, what the workloads are: "
        "benchmarks/agents/workload.py. In parentheses: 95 % intervals over sessions (bootstrap), and of rates the range over "
        f"{config['repeats']} repeats with other sessions. Wanted KV: what its caches would hold if they gave up nothing. "
        "Hit ratio and prefilled tokens are of the turns; what is prefilled ahead of them stands beside. A session is good if "
        f"each first token comes within {objective['ttft_s']:g} s and tokens {objective['inter_token_s']:g} s apart.",
        f"![plots]({plots})",
    ]
    for experiment in config["experiments"]:
        parts.append(f"## {experiment}\n\n{_table(experiment, systems)}")
    if errors := simulation_errors(systems):
        parts.append(f"## Simulation against measurement\n\n{_simulated(systems, errors)}")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts.append(
        f"Measured by `{result['command']}` on {result['date'][:10]} at revision {result['revision']}: "
        f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores; {versions}."
    )
    return "\n\n".join(parts) + "\n"


def _table(experiment: str, systems: dict) -> str:
    there = {what for of in systems.values() for what in of["experiments"][experiment]}
    counted = [what for what in COUNTED if what in there]
    titles = [title for title, *_ in SHOWN.values()] + [what.replace("_", " ") for what in counted]
    lines = ["| | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for name, of in systems.items():
        seen = of["experiments"][experiment]
        cells = [_cell(seen[what], factor, digits) for what, (_, factor, digits) in SHOWN.items()]
        lines.append(f"| {name} | " + " | ".join([*cells, *(str(seen.get(what, "")) for what in counted)]) + " |")
    return "\n".join(lines)


def _cell(figure: dict, factor: float, digits: int) -> str:
    if figure["value"] is None:
        return ""
    value, *interval = (f"{factor * figure[part]:.{digits}f}" for part in ("value", "low", "high") if figure[part] is not None)
    return f"{value} ({' to '.join(interval)})" if len(set(interval)) == 2 else value


def _simulated(systems: dict, errors: dict[str, float]) -> str:
    lines = [
        "The same sessions by benchmarks/agents/simulation.py, with costs measured in the running systems. Median error: "
        + ", ".join(f"{what} {100 * error:.0f} %" for what, error in errors.items()) + ".",
        "",
        "| | | " + " | ".join(f"{what}, measured | simulated" for what in COMPARED) + " |",
        "| --- | --- |" + " ---: |" * (2 * len(COMPARED)),
    ]  # fmt: skip
    for name, of in systems.items():
        for experiment, simulated in of.get("simulated", {}).items():
            seen = of["experiments"][experiment]
            pairs = (f"{seen[what]['value']:.3g} | {simulated[what]['value']:.3g}" for what in COMPARED)
            lines.append(f"| {name} | {experiment} | " + " | ".join(pairs) + " |")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    systems, experiments = result["systems"], result["config"]["experiments"]
    figure, axes = pyplot.subplots(2, 3, figsize=(16, 9), layout="constrained")
    by_load = [(load, f"react, {MODELS} models, {load} at once") for load in LOADS]
    by_models = [(n, f"react, {n} models, {LOADS[-1]} at once") for n in sorted((MODELS, *OTHER_MODELS))]
    for row, (points, label) in enumerate(((by_load, "sessions at once"), (by_models, "models"))):
        there = [(x, experiment) for x, experiment in points if experiment in experiments] or list(enumerate(experiments))
        _lines(axes[row][0], there, systems, "turns_per_s", label, "turns per second")
        _lines(axes[row][1], there, systems, "session_s_p95", label, "p95 of a session, s")
    there = [(x, experiment) for x, experiment in by_load if experiment in experiments] or list(enumerate(experiments))
    _lines(axes[0][2], there, systems, "hit_ratio", "sessions at once", "prefix-cache hit ratio, %", 100)
    _times(axes[1][2], there[-1][1], systems)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _lines(ax, points: Sequence[tuple[int, str]], systems: dict, what: str, xlabel: str, ylabel: str, factor: float = 1):
    for name, of in systems.items():
        seen = [(x, of["experiments"][experiment][what]) for x, experiment in points]
        seen = [(x, value) for x, value in seen if value["value"] is not None]
        values = [factor * value["value"] for _, value in seen]
        either = [[factor * _below(value) for _, value in seen], [factor * _above(value) for _, value in seen]]
        ax.errorbar([x for x, _ in seen], values, either, marker="o", capsize=3, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()


def _below(figure: dict) -> float:
    """How far the interval reaches below the value; a small sample's bootstrap interval need not contain the value."""
    return 0.0 if figure["low"] is None else max(0.0, figure["value"] - figure["low"])


def _above(figure: dict) -> float:
    return 0.0 if figure["high"] is None else max(0.0, figure["high"] - figure["value"])


def _times(ax, experiment: str, systems: dict) -> None:
    """Plot where a turn's time goes. For a system that does not report prefill, that is part of the time to the first token."""
    parts = {
        "prefill, with its queue": lambda seen: seen["prefill_s_mean"]["value"],
        "then to the first token": lambda seen: seen["ttft_s_mean"]["value"] - seen["prefill_s_mean"]["value"],
        "other tokens": lambda seen: seen["turn_s_mean"]["value"] - seen["ttft_s_mean"]["value"],
    }
    below = [0.0] * len(systems)
    for title, part in parts.items():
        values = [part(of["experiments"][experiment]) for of in systems.values()]
        ax.bar(list(systems), values, bottom=below, label=title)
        below = [b + v for b, v in zip(below, values, strict=True)]
    ax.set(ylabel="mean seconds of a turn", title=experiment)
    ax.legend()


