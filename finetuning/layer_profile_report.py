"""A layer profile for people: divergence against layers recomputed, and how much each layer matters."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from prefillshare.kvshare.layer_profile import LayerProfile

PLOT = "layer_profile.png"


def table(profile: LayerProfile) -> Table:
    made = Table("layers", "of", "divergence, nats/token", "95 %", "same choice", *_suites(profile), title="frontier")
    for point in profile.frontier:
        scores = [f"{100 * (point.scores or {}).get(suite, float('nan')):.1f} %" for suite in _suites(profile)]
        made.add_row(
            point.layers, f"{point.size}/{profile.layers}", f"{point.divergence:.4f}", f"{point.low:.4f} to {point.high:.4f}",
            f"{100 * point.agreement:.1f} %", *scores,
        )  # fmt: skip
    return made


def _suites(profile: LayerProfile) -> list[str]:
    return sorted({suite for point in profile.points for suite in point.scores or {}})


def plot(profile: LayerProfile, folder: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    best, sizes = profile.frontier, [p.size for p in profile.points]
    left.plot(sizes, [p.divergence for p in profile.points], ".", color="lightgrey", label="measured")
    either = [[p.divergence - p.low for p in best], [p.high - p.divergence for p in best]]
    left.errorbar([p.size for p in best], [p.divergence for p in best], either, marker="o", capsize=3, label="frontier")
    for point in best:
        left.annotate(point.layers, (point.size, point.divergence), textcoords="offset points", xytext=(4, 4), fontsize=7)
    left.set(xlabel=f"layers recomputed, of {profile.layers}", ylabel="divergence, nats per token", ylim=(0, None))
    left.legend()
    right.bar(range(profile.layers), profile.sensitivity)
    right.set(xlabel="layer whose KV alone is the base's", ylabel="divergence, nats per token")
    path = folder / PLOT
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
