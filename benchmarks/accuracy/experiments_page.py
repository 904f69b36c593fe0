"""The experiments for people: the first part of docs/accuracy.md, and its plot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.accuracy.rows import NAIVE

#: Line of the plot -> its colour, the experiments whose points it joins, the ordinary fine-tunes at its right end (they compute
#: all of a prompt), and the study's rows where it has no experiment.
LINES = {
    "over the model as it comes": (
        "tab:blue", ("home", "home-own-32"), ("home-ordinary",), ("PrefillShare, LoRA", "LoRA fine-tuning")
    ),
    "over a base tuned on other tasks": ("tab:orange", ("base-home", "base-home-own-32"), ("base-home-ordinary",), ()),
    "over that base after 100 transcripts of this task": (
        "tab:purple", ("seen-home", "seen-home-own-32"), ("seen-home-ordinary",), ()
    ),
    "over a base tuned on this task, too": (
        "tab:green", ("agents-home", "agents-home-own-32", "base-tools"), ("agents-home-ordinary", "base-tools-ordinary"), ()
    ),
}  # fmt: skip
#: An ordinary fine-tune that is asked over base KV; in the study, one of all weights.
COLLAPSE = "an ordinary fine-tune, fed base KV"
SUITES = ("bfcl_simple_python", "bfcl_multiple", "arithmetic", "home_commands")


def markdown(result: dict, plot: str) -> str:
    found = result["experiments"]
    hardware, versions = result["hardware"], ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    return "\n\n".join(
        (
            _answer(found),
            f"![right answers against prompt tokens that a decoder computes]({plot})",
            _APPENDIX + "\n".join(_rows(found)),
            *([f"Not trained yet: {', '.join(result['missing'])}."] if result["missing"] else []),
            f"Measured by `{result['command']}` on {result['date'][:10]} at revision {result['revision']}: "
            f"{hardware.get('gpu', 'no GPU')}, {hardware['cpu']}, {hardware['cores']} cores; {versions}. All figures: "
            "[benchmarks/results/experiments.json](../benchmarks/results/experiments.json).",
            *_earlier(found),
        )
    )


def _answer(found: dict) -> str:
    def gap(name: str, suite: str) -> str:
        return f"{_points(found[name]['suites'][suite]['gap'])} points"

    own = found["base-home-own-32"]["changes"]["own_tokens"]
    return f"""\
**Little, over a base that has learnt your tasks.** Tune one base on all of them (`method: base`), freeze it, and train decoders
over its KV. Then an adapter needs nothing of its own: {gap("base-tools", "bfcl_simple_python")} from an ordinary
LoRA of the same size at `bfcl_simple_python`, {gap("base-tools", "bfcl_multiple")} at `bfcl_multiple`,
{gap("agents-home", "home_commands")} at `home_commands`. A decoder that computes the last {own} tokens of each
prompt itself (`own_tokens`) wins back most of what is left, {gap("agents-home-own-32", "home_commands")} there, and
two thirds where the base has not learnt the task: {gap("base-home-own-32", "home_commands")}, where the model as it
comes loses {gap("home", "home_commands")}. An ordinary fine-tune that is fed base KV collapses."""


def _points(gap: dict) -> str:
    return f"{100 * gap['mean']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"


_APPENDIX = """\
Each line begins at the left with a decoder that computes only the last token of a prompt, and ends at the right with the
ordinary fine-tune of the same base, which computes all of it. Bars are 95 % intervals. At arithmetic, and at tool calling over
the model as it comes, the figures are those of the [study below](#all-methods-over-the-model-as-it-comes), on more data.

## Experiments

Each on at most 700 transcripts of a suite, with LoRA of rank 8 if nothing else is said. The bases: `home...` the model as it
comes; `base...`, `seen...`, `agents...` and `joint...` what the experiment of that name makes. Gaps are to the
ordinary fine-tune of the same size from the same base, over the same questions, in points, with 95 % intervals. They are over
questions like these, and, where several seeds are named, over trainings like these.

| experiment | supposed | suite | tokens of a prompt computed | right, % | gap | seeds | verdict |
| --- | --- | --- | ---: | ---: | --- | ---: | --- |
"""


def _rows(found: dict) -> Iterable[str]:
    for name, made in found.items():
        for suite, figures in made["suites"].items():
            right = f"{100 * figures['accuracy']:.1f} ({100 * figures['low']:.1f} to {100 * figures['high']:.1f})"
            gap = _points(figures["gap"]) if "gap" in figures else ""
            seeds = len(figures.get("seeds", [0]))
            yield (
                f"| `{name}` | {made['supposed']} | `{suite}` | {figures['computed']:.0f} | {right} | {gap} | {seeds} "
                f"| {made['verdict']} |"
            )


def _earlier(found: dict) -> Iterable[str]:
    """Which figures are from earlier runs."""
    runs: dict[str, list[str]] = {}
    for name, made in found.items():
        if on := made.get("measured"):
            where = f"{on['date'][:10]} at revision {on['revision']}, {on['hardware'].get('gpu', on['hardware']['cpu'])}"
            runs.setdefault(where, []).append(f"`{name}`")
    return (f"From an earlier run, on {where}: {', '.join(names)}." for where, names in runs.items())


def plot(result: dict, study: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, of_study = result["experiments"], _of_study(study)
    figure, axes = pyplot.subplots(1, len(SUITES), figsize=(4.2 * len(SUITES), 4.4), layout="constrained", sharey=True)
    for ax, suite in zip(axes, SUITES, strict=True):
        whole = _whole_prompt(found, suite)
        rows, curve = of_study.get(suite, ({}, []))
        for line, (colour, shared, ordinary, from_study) in LINES.items():
            points = [found[name]["suites"][suite] for name in (*shared, *ordinary) if suite in _suites(found, name)]
            points = points or [rows[name] | {"computed": at} for name, at in zip(from_study, (1, whole), strict=False) if rows]
            _draw(ax, line, points, color=colour)
        for made in found.values():
            if "fed_base_kv" in made and next(iter(made["suites"])) == suite:
                curve = made["fed_base_kv"]
        _draw(ax, COLLAPSE, [{"computed": max(1, whole * (1 - point["share"]))} | point for point in curve], "grey", ":")
        ax.set(title=suite, xlabel="tokens of a prompt that the decoder computes", xscale="log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("right answers, %")
    axes[0].set_ylim(bottom=0)
    figure.legend(*_legend(axes), loc="outside lower center", ncols=len(LINES) + 1, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _of_study(study: dict) -> dict[str, tuple[dict, list[dict]]]:
    """Suite -> the study's rows, and its points of naive sharing."""
    return {
        suite: (figures["rows"], figures.get("curve", {}).get(NAIVE) or [figures["rows"][NAIVE] | {"share": 1.0}])
        for of in study["studies"].values()
        for suite, figures in of["suites"].items()
    }


def _whole_prompt(found: dict, suite: str) -> float:
    """Mean tokens of a prompt: what the decoder that computes most of it computes."""
    return max((_suites(found, name)[suite]["computed"] for name in found if suite in _suites(found, name)), default=1.0)


def _legend(axes) -> tuple[list, list[str]]:
    """Each label once, whichever panel has it."""
    by_label = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    return list(by_label.values()), list(by_label)


def _suites(found: dict, name: str) -> dict:
    return found[name]["suites"] if name in found else {}


def _draw(ax, label: str, points: list[dict], color: str, linestyle: str = "-") -> None:
    if not points:
        return
    points = sorted(points, key=lambda point: point["computed"])
    right = [100 * point["accuracy"] for point in points]
    either = [[100 * abs(point["accuracy"] - point[end]) for point in points] for end in ("low", "high")]
    computed = [point["computed"] for point in points]
    ax.errorbar(computed, right, either, marker="o", capsize=3, label=label, color=color, linestyle=linestyle)
