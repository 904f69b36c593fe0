"""The experiments for people: the first part of docs/accuracy.md, and its plot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

#: Line of the plot -> its colour, and the experiments whose points it joins.
LINES = {
    "PrefillShare over the model": ("tab:blue", ("home", "home-own-32", "home-own-64", "tools")),
    "PrefillShare over the tuned base": ("tab:orange", ("base-home", "base-home-own-32", "base-tools")),
    "ordinary, from the model": ("tab:green", ("home-ordinary", "tools-ordinary")),
    "ordinary, from the tuned base": ("tab:red", ("base-home-ordinary", "base-tools-ordinary")),
}
#: The ordinary fine-tunes that are asked over base KV, too.
COLLAPSE = "ordinary, from the model, fed base KV"
#: Suites of the plot, and what the base has to do with them.
SUITES = {
    "home_commands": "a task that the tuned base has not learnt",
    "bfcl_simple_python": "one that it has",
    "bfcl_multiple": "one that it has",
}


def markdown(result: dict, plot: str) -> str:
    found = result["experiments"]
    hardware, versions = result["hardware"], ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    return "\n\n".join(
        (
            _answer(found),
            f"![right answers against prompt tokens that a decoder computes]({plot})",
            _APPENDIX + "\n".join(_rows(found)),
            *([f"Not trained here: {', '.join(result['missing'])}."] if result["missing"] else []),
            f"Measured by `{result['command']}` on {result['date'][:10]} at revision {result['revision']}: "
            f"{hardware.get('gpu', 'no GPU')}, {hardware['cpu']}, {hardware['cores']} cores; {versions}. All figures: "
            "[benchmarks/results/experiments.json](../benchmarks/results/experiments.json).",
        )
    )


def _answer(found: dict) -> str:
    def gap(name: str, suite: str) -> str:
        return f"{_points(found[name]['suites'][suite]['gap'])} points"

    home, own = gap("home", "home_commands"), found["base-home-own-32"]["changes"]["own_tokens"]
    return f"""\
**Little, if the base is worth sharing and the decoder reads the question itself.** Tune the base on your tasks first (`method:
base`), freeze it, and train decoders over its KV. For a task that it has learnt, an adapter needs nothing of its own:
{gap("base-tools", "bfcl_simple_python")} from an ordinary LoRA of the same size at `bfcl_simple_python`,
{gap("base-tools", "bfcl_multiple")} at `bfcl_multiple`. For one that it has not learnt, let the decoder compute the last {own}
tokens of each prompt itself (`own_tokens`): {gap("base-home-own-32", "home_commands")} at `home_commands`, where it is
{home} over the model as it comes. An ordinary fine-tune that is fed base KV collapses."""


def _points(gap: dict) -> str:
    return f"{100 * gap['mean']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"


_APPENDIX = """\
The lines are over the same questions; bars are 95 % intervals.

## Experiments

Each on at most 700 transcripts, with LoRA of rank 8; "tuned base" is the experiment `base`. Gaps are to the ordinary fine-tune
of the same size, from the same base, over the same questions, in points, with 95 % intervals. They are over questions like
these, and, where several seeds are named, over trainings like these.

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


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    found = result["experiments"]
    figure, axes = pyplot.subplots(1, len(SUITES), figsize=(5 * len(SUITES), 4.2), layout="constrained", sharey=True)
    for ax, (suite, about) in zip(axes, SUITES.items(), strict=True):
        for line, (colour, names) in LINES.items():
            _draw(ax, line, [found[name]["suites"][suite] for name in names if suite in _suites(found, name)], color=colour)
        fed = [made["fed_base_kv"] for made in found.values() if "fed_base_kv" in made and next(iter(made["suites"])) == suite]
        for points in fed:
            _draw(ax, COLLAPSE, points, color="grey", linestyle=":")
        ax.set(title=f"{suite}:\n{about}", xlabel="tokens of a prompt that the decoder computes", xscale="log")
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("right answers, %")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _suites(found: dict, name: str) -> dict:
    return found[name]["suites"] if name in found else {}


def _draw(ax, label: str, points: list[dict], **style) -> None:
    if not points:
        return
    points = sorted(points, key=lambda point: point["computed"])
    right = [100 * point["accuracy"] for point in points]
    either = [[100 * abs(point["accuracy"] - point[end]) for point in points] for end in ("low", "high")]
    ax.errorbar([point["computed"] for point in points], right, either, marker="o", capsize=3, label=label, **style)
