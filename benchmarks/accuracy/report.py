"""The results of benchmarks.accuracy for people: docs/accuracy.md and its plots, generated and never edited."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.accuracy import experiments_page
from benchmarks.accuracy.rows import REFERENCE, ROWS
from benchmarks.shared.result import RESULTS
from prefillshare.kvshare.layer_profile import Point, frontier_of

PAGE, PLOT, CURVES = Path("docs/accuracy.md"), Path("docs/accuracy.png"), Path("docs/accuracy_curves.png")
#: Comments on the figures, written by hand and inserted into the page.
NOTES = Path(__file__).parent / "notes.md"

_TOP = """\
# What sharing costs in right answers

<!-- Made by `make accuracy`; change benchmarks/accuracy/ instead. -->

"""
_STUDY = """\
## All methods over the model as it comes

Every row answers the same test questions, greedily; the model is SmolLM2-135M-Instruct in bfloat16. Shares of right answers
are in percent, with 95 % intervals (Wilson). Differences are from full fine-tuning, and from the ordinary fine-tune of the same
size (for a decoder that was not trained for sharing, this is the same decoder over its own prefill); they are over the same
questions, with the 95 % interval for paired shares (Agresti and Min). The intervals are over
questions like these, for one training each; they do not cover how decoders differ between training seeds. The suites are
described in [training.md](training.md); the arithmetic questions use templates that training has seen, with names and numbers
that it has not.

| row | |
| --- | --- |
"""


def write(study: dict | None = None, experiments: dict | None = None) -> None:
    """Write the page and its plots. What is not given is read from benchmarks/results."""
    study = study or json.loads((RESULTS / "accuracy.json").read_text())
    experiments = experiments or json.loads((RESULTS / "experiments.json").read_text())
    PAGE.write_text(_TOP + experiments_page.markdown(experiments, PLOT.name) + "\n\n" + markdown(study))
    experiments_page.plot(experiments, study, PLOT)
    plot(study, CURVES)


def markdown(result: dict) -> str:
    """The part on the study."""
    parts = [_STUDY + "\n".join(f"| {row.name} | {row.about} |" for row in ROWS)]
    for study, found in result["studies"].items():
        parts.append(f"### {study.capitalize()}")
        for suite, figures in found["suites"].items():
            parts.append(_scores(suite, figures["rows"]))
        parts.append(_trainings(found))
        parts += [_frontier(training, profile) for training, profile in found["profiles"].items()]
    parts.append(
        "### Accuracy against the share of the prompt that is base KV\n\n"
        f"![accuracy by share]({CURVES.name})\n\n"
        "The rest of the prompt is the decoder's own KV. At 0 % the ordinary fine-tune is what it was trained to be; 100 % is "
        f"naive sharing. Each point is over the same {result['config']['curve_questions']} questions; bars: 95 %."
    )
    parts.append(NOTES.read_text().strip())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    hardware = result["hardware"]
    parts.append(
        f"Measured by `{result['command']}` on {result['date'][:10]} at revision {result['revision']}: "
        f"{hardware.get('gpu', 'no GPU')}, {hardware['cpu']}, {hardware['cores']} cores; {versions}. All figures: "
        "[benchmarks/results/accuracy.json](../benchmarks/results/accuracy.json)."
    )
    return "\n\n".join(parts) + "\n"


def _scores(suite: str, rows: dict) -> str:
    asked = rows["base"]["asked"]
    lines = [f"`{suite}`, {asked} questions", "",
             "| | right, % | 95 % interval | against full fine-tuning, points | against the ordinary one of its size, points |",
             "| --- | ---: | --- | --- | --- |"]  # fmt: skip
    for name, row in rows.items():
        against = "" if name == REFERENCE else _apart(row["difference"])
        gap = _apart(row["gap"]) if "gap" in row else ""
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        lines.append(f"| {name} | {100 * row['accuracy']:.1f} | {interval} | {against} | {gap} |")
    return "\n".join(lines)


def _apart(apart: dict) -> str:
    """Without an interval if the answers question by question are not at hand any more."""
    if "low" not in apart:
        return f"{100 * apart['mean']:+.1f}"
    return f"{100 * apart['mean']:+.1f} ({100 * apart['low']:+.1f} to {100 * apart['high']:+.1f})"


def _trainings(found: dict) -> str:
    data, first = found["data"], next(iter(found["trainings"].values()))
    lines = [
        f"All were trained on the same data: of {data['transcripts']:,} transcripts by `prefillshare data {data['suite']}`, "
        f"the {first['transcripts']:,} that are no longer than the recipe's `max_tokens`:",
        "",
        "| | transcripts | epochs | loss at the end | minutes | on |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, figures in found["trainings"].items():
        seen = f"{figures['transcripts']:,} | {figures['epochs']}"
        taken = f"{figures['loss']:.3f} | {figures['seconds'] / 60:.1f} | {figures['device']}"
        lines.append(f"| {name} | {seen} | {taken} |")
    if found["missing"]:
        lines += ["", f"Not trained for this study: {'; '.join(found['missing'])}."]
    return "\n".join(lines)


def _frontier(training: str, profile: dict) -> str:
    points = frontier_of([Point(**point) for point in profile["points"]], lambda point: (point.size, point.divergence))
    lines = [
        f"{training[0].upper() + training[1:]}, served by DroidSpeak: which of {profile['layers']} layers it should compute "
        "itself, by `prefillshare profile` (divergence from its own prefill, nats per response token):",
        "",
        "| layers | of them | divergence | 95 % | same likeliest token, % |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for point in points:
        lines.append(
            f"| {point.layers} | {point.size} | {point.divergence:.4f} | {point.low:.4f} to {point.high:.4f} "
            f"| {100 * point.agreement:.1f} |"
        )
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    studies = list(result["studies"].items())
    figure, axes = pyplot.subplots(1, len(studies), figsize=(5 * len(studies), 4), layout="constrained", squeeze=False)
    for ax, (study, found) in zip(axes[0], studies, strict=True):
        suite, figures = next((s, f) for s, f in found["suites"].items() if "curve" in f)
        for name, points in figures["curve"].items():
            right = [100 * point["accuracy"] for point in points]
            if len(points) == 1:
                ax.axhline(right[0], color="grey", linestyle=":", label=name)
                continue
            either = [[100 * abs(point["accuracy"] - point[end]) for point in points] for end in ("low", "high")]
            ax.errorbar([100 * p["share"] for p in points], right, either, marker="o", capsize=3, label=name)
        ax.set(title=f"{study}: {suite}", ylim=(0, None))
        ax.set(xlabel="share of the prompt that is base KV, %", ylabel="right answers, %")
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
