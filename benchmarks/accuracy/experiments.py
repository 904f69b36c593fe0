"""Experiments on what closes the gap between sharing and ordinary fine-tuning, each on little data, to rule out what does not.

    python -m benchmarks.accuracy.experiments [NAME...] [--questions N] [--seeds N]

 1. Trains what is not there yet (benchmarks/accuracy/hypotheses.py), on at most 700 transcripts of a suite: what is named, and
    what that is trained over or compared with.
 2. Asks test questions of each suite, offline.
 3. Writes benchmarks/results/experiments.json and docs/accuracy.md. Experiments that were not asked this time keep their
    figures, and say where they are from. The last line is JSON, of those that were asked.

About half an hour per ordinary training on two cores. What is done is kept in runs/screen, so that a run that is started again
goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.accuracy import report, transcripts
from benchmarks.accuracy.asker import Asker
from benchmarks.accuracy.figures import apart_of_seeds, shares, shares_of_seeds
from benchmarks.accuracy.hypotheses import BY_NAME, EXPERIMENTS, Experiment
from benchmarks.accuracy.making import make
from benchmarks.accuracy.rows import Row
from benchmarks.shared.result import RESULTS, write
from benchmarks.shared.small import MODEL, bars
from prefillshare.finetuning import subjects
from prefillshare.finetuning.recipe import Recipe, device_of, is_whole
from prefillshare.models import fetch

#: Shares of the prompt that are base KV, for decoders that were not trained for it, and most questions of each.
FED, FED_QUESTIONS = (1.0, 0.9, 0.75, 0.5), 100
#: Suite -> whether each answer is right.
Answers = dict[str, list[bool]]


class Answered:
    """The answers of what one recipe has made, and how much of the prompts it computed itself."""

    def __init__(self, recipe: Recipe, questions: int):
        self._made = Path(recipe.output)
        base, self._decoder = (self._made, None) if recipe.makes_base else (Path(recipe.base), self._made)
        self._method = "ordinary" if recipe.makes_base else recipe.method
        self._asker = Asker(base, questions, 32, device_of("auto"))

    def right(self, suite: str, console: Console, fed: float | None = None) -> list[bool]:
        """`fed`: the share of the prompt that is base KV, although the decoder was not trained for it."""
        most = None if fed is None else FED_QUESTIONS
        method, share = (self._method, 1.0) if fed is None else ("prefillshare", fed)
        title = f"{self._made.name}, {suite}" + ("" if fed is None else f", {fed:.0%} base KV")
        with bars(console) as progress:
            bar = progress.add_task(title, total=len(self._asker.questions(suite, most)))
            advance = partial(progress.advance, bar)
            return self._asker.right(Row(title, "", None, method), self._decoder, suite, share, most, advance)

    def computed(self, suite: str, fed: float | None = None) -> float:
        """Mean tokens of a prompt that the decoder computes itself."""
        lengths = self._asker.prompt_lengths(suite)
        if fed is not None:
            return fmean(length - int((length - 1) * fed) for length in lengths)
        method = subjects.method_for(self._decoder, self._method)
        return fmean(length - method.base_tokens(length) for length in lengths)


@dataclass(frozen=True)
class Measured:
    """One experiment's outcome. `right`: of each seed. `computed`: suite -> mean tokens of a prompt that the decoder computes
    itself. `fed`: what it answers if a part of the prompt is base KV for which it was not trained."""

    right: list[Answers]
    computed: dict[str, float]
    fed: list[dict]

    @classmethod
    def of(cls, experiment: Experiment, recipes: Sequence[Recipe], questions: int, console: Console) -> Measured:
        made = [Answered(recipe, questions) for recipe in recipes]
        right = [{suite: one.right(suite, console) for suite in experiment.suites} for one in made]
        computed = {suite: made[0].computed(suite) for suite in experiment.suites}
        suite, fed = experiment.suites[0], []
        for share in FED if experiment.is_fed_base_kv else ():
            answers = shares(made[0].right(suite, console, share))
            fed.append({"share": share, "computed": made[0].computed(suite, share)} | answers)
        return cls(right, computed, fed)


def figures_of(experiment: Experiment, measured: Measured, reference: Measured | None) -> dict:
    """`reference`: the fine-tune that it is compared with."""
    suites = {}
    for suite in experiment.suites:
        answers = [of_seed[suite] for of_seed in measured.right]
        suites[suite] = shares_of_seeds(answers) | {"computed": measured.computed[suite]}
        if reference:
            seeds = min(len(answers), len(reference.right))
            suites[suite]["gap"] = apart_of_seeds(answers[:seeds], [of_seed[suite] for of_seed in reference.right[:seeds]])
    learnt = json.loads((experiment.folder() / "figures.json").read_text())
    told = {key: getattr(experiment, key) for key in ("supposed", "verdict", "over", "against", "changes", "data")}
    told |= {key: learnt[key] for key in ("transcripts", "loss", "seconds", "device")}
    return told | {"suites": suites} | ({"fed_base_kv": measured.fed} if measured.fed else {})


#: What figures of an experiment hold for: they are kept as long as it is still this.
_MADE_BY = ("over", "against", "changes", "data")
_MEASURED_ON = ("date", "revision", "hardware")


def beside_earlier(found: dict, earlier: dict) -> dict:
    """What is `found`, and of an `earlier` result what is not, with what that was measured on."""
    every = {}
    for name, experiment in BY_NAME.items():
        kept = earlier["experiments"].get(name)
        if name in found:
            every[name] = found[name]
        elif kept and all(kept[key] == getattr(experiment, key) for key in _MADE_BY):
            measured = {"measured": {key: earlier[key] for key in _MEASURED_ON}}
            every[name] = measured | kept | {"supposed": experiment.supposed, "verdict": experiment.verdict}
    return every


def with_references(names: Sequence[str]) -> list[str]:
    """These experiments and what they are compared with, in the order in which they are made."""
    wanted = {*names, *(BY_NAME[name].against for name in names)}
    return [name for name in BY_NAME if name in wanted]


def _interval(figures: dict) -> list[float]:
    """The gap to the ordinary fine-tune and its interval; empty where there is none."""
    return [figures["gap"][key] for key in ("mean", "low", "high")] if "gap" in figures else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BY_NAME)} (default: all)")
    parser.add_argument("--questions", type=int, default=200, help="of each suite, evenly spread (default: 200)")
    parser.add_argument("--seeds", type=int, help="trainings of each, which differ by seed (default: as many as each names)")
    parser.add_argument("--only-trained", action="store_true", help="train nothing: those that are not there are left out")
    args = parser.parse_args()
    if wrong := set(args.names) - BY_NAME.keys():
        parser.error(f"no such experiment: {', '.join(sorted(wrong))}")
    console, model = Console(stderr=True), fetch(MODEL)
    transcripts.make(AutoTokenizer.from_pretrained(model))
    measured: dict[str, Measured] = {}
    for experiment in (BY_NAME[name] for name in with_references(args.names or list(BY_NAME))):
        recipes = [experiment.recipe(model, seed) for seed in range(args.seeds or experiment.seeds)]
        if args.only_trained:
            recipes = [recipe for recipe in recipes if is_whole(Path(recipe.output))]
        if recipes:
            make(experiment, recipes, model, console)
            measured[experiment.name] = Measured.of(experiment, recipes, args.questions, console)
    found = {
        name: figures_of(experiment := BY_NAME[name], outcome, measured.get(experiment.against or ""))
        for name, outcome in measured.items()
    }
    headline = {
        f"{suite}: {name}": [round(100 * share, 1) for share in (of["accuracy"], *_interval(of))]
        for name, made in found.items()
        for suite, of in made["suites"].items()
    }
    every = beside_earlier(found, json.loads((RESULTS / "experiments.json").read_text()))
    missing = [experiment.name for experiment in EXPERIMENTS if experiment.name not in every]
    parts = {"experiments": every, "missing": missing}
    report.write(experiments=write("accuracy.experiments", console, vars(args), headline, file="experiments", **parts))


if __name__ == "__main__":
    main()
