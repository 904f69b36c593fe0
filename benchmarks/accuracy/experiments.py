"""Experiments on what closes the gap between sharing and ordinary fine-tuning, each on little data, to rule out what does not.

    python -m benchmarks.accuracy.experiments [NAME...] [--questions N] [--seeds N]

 1. Trains what is not there yet, on at most SCREEN transcripts of a suite, as far as they are no longer than the recipe's
    `max_tokens`. What an experiment trains may be the base of later ones.
 2. Asks test questions of each suite, offline.
 3. Writes benchmarks/results/experiments.json, unless only some are named. The last line is JSON.

About half an hour per ordinary training on two cores. What is done is kept in runs/screen, so that a run that is started again
goes on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.accuracy.asker import Asker
from benchmarks.accuracy.figures import apart_of_seeds, shares_of_seeds
from benchmarks.accuracy.rows import OTHERS, Row
from benchmarks.shared.result import write
from benchmarks.shared.small import MODEL, bars
from prefillshare.finetuning.recipe import Recipe, device_of, parse
from prefillshare.finetuning.several import train_all
from prefillshare.finetuning.tasks import TASKS, write_transcripts
from prefillshare.models import fetch

RUNS = Path("runs/screen")
SCREEN, MAX_TOKENS = 700, 768
#: Name -> (suite, transcripts that are made, of which the first that are short enough are taken, most others before each).
DATA = {
    "tools": ("bfcl_simple_python", 3600, OTHERS),
    "arithmetic": ("arithmetic", 2600, OTHERS),
    "home": ("home_commands", SCREEN, 0),
}
TOOLS, HOME = ("bfcl_simple_python", "bfcl_multiple"), ("home_commands",)
#: Two turns, one of each, in one transcript where both fit: both are learnt.
MIXTURE = "mixture"
MIXED = ("tools", "arithmetic")
#: Suite -> whether each answer is right.
Answers = dict[str, list[bool]]


@dataclass(frozen=True)
class Experiment:
    """`changes`: to the recipe. `over`: the experiment that makes its base; None: the model itself. `against`: the ordinary
    fine-tune of the same size over the same base, which it is compared with."""

    name: str
    about: str
    data: str
    suites: tuple[str, ...]
    changes: dict = field(default_factory=dict)
    over: str | None = None
    against: str | None = None

    def folder(self, seed: int = 0) -> Path:
        return RUNS / (f"{self.name}-seed-{seed}" if seed else self.name)

    def recipe(self, model: Path, seed: int = 0) -> Recipe:
        base = str(BY_NAME[self.over].folder() if self.over else model)
        screen = {
            "base": base, "train": str(data_file(self.data)), "output": str(self.folder(seed)), "epochs": 2, "seed": seed,
            "dtype": "bfloat16", "max_tokens": MAX_TOKENS, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-3,
            "checkpoint_every_steps": 20, "lora": {"rank": 8, "alpha": 32, "saved_as": "bfloat16"},
        }  # fmt: skip
        return parse(screen | self.changes)


ORDINARY = {"method": "ordinary", "base_kv_gib": 0}
TUNED = {"method": "base", "base_kv_gib": 0, "lora": {"rank": 16, "alpha": 64, "saved_as": "bfloat16"}}
EXPERIMENTS = (
    Experiment("base", "a base tuned on tool calls and arithmetic", MIXTURE, (*TOOLS, "arithmetic"), TUNED),
    Experiment("home-ordinary", "home commands in the ordinary way", "home", HOME, ORDINARY),
    Experiment("home", "home commands over the model's KV", "home", HOME, against="home-ordinary"),
    *(Experiment(f"home-own-{n}", f"as home; the decoder computes a prompt's last {n} tokens itself", "home", HOME,
                 {"own_tokens": n}, against="home-ordinary") for n in (32, 64)),
    Experiment("home-own-32-longer", "as home-own-32, for twice the epochs", "home", HOME, {"own_tokens": 32, "epochs": 4},
               against="home-ordinary"),
    Experiment("base-home-ordinary", "home commands in the ordinary way, from the tuned base", "home", HOME, ORDINARY, "base"),
    Experiment("base-home", "home commands over the tuned base's KV, which has learnt nothing of them", "home", HOME,
               over="base", against="base-home-ordinary"),
    Experiment("base-home-own-32", "as base-home; the decoder computes a prompt's last 32 tokens itself", "home", HOME,
               {"own_tokens": 32}, over="base", against="base-home-ordinary"),
    Experiment("base-tools", "tool calls over the tuned base's KV", "tools", TOOLS, over="base", against="base-tools-ordinary"),
    Experiment("base-tools-ordinary", "tool calls in the ordinary way, from the tuned base", "tools", TOOLS, ORDINARY, "base"),
    Experiment("tools", "tool calls over the model's KV", "tools", TOOLS, against="tools-ordinary"),
    Experiment("tools-ordinary", "tool calls in the ordinary way", "tools", TOOLS, ORDINARY),
)  # fmt: skip
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


def data_file(name: str) -> Path:
    return RUNS / "data" / f"{name}.jsonl"


def made_data(tokenizer) -> None:
    """Make the transcripts that are not there."""
    for name, (suite, count, others) in DATA.items():
        if not data_file(name).is_file():
            write_transcripts([TASKS[suite]], data_file(name), count, others=others)
            made = data_file(name).read_text().splitlines(keepends=True)
            data_file(name).write_text("".join([line for line in made if _fits(tokenizer, _messages(line))][:SCREEN]))
    if not data_file(MIXTURE).is_file():
        turns = [[_messages(line)[-3:] for line in data_file(name).read_text().splitlines()] for name in MIXED]
        made = mixed(turns, lambda messages: _fits(tokenizer, messages))
        data_file(MIXTURE).write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in made))


def mixed(turns: Sequence[Sequence[list]], fits, seed: int = 0) -> list[list]:
    """Pairs of turns, one of each of two tasks, in either order; a pair that does not fit becomes two transcripts."""
    rng, made = random.Random(seed), []
    for one, other in zip(*turns, strict=True):
        pair = one + other if rng.random() < 0.5 else other + one
        made += [pair] if fits(pair) else [one, other]
    rng.shuffle(made)
    return made


def _messages(line: str) -> list[dict]:
    return json.loads(line)["messages"]


def _fits(tokenizer, messages: list[dict]) -> bool:
    return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)) <= MAX_TOKENS


def answered(recipe: Recipe, experiment: Experiment, questions: int, console: Console) -> Answers:
    """The answers of what the recipe has made."""
    made = Path(recipe.output)
    base, decoder = (made, None) if recipe.makes_base else (Path(recipe.base), made)
    row = Row(experiment.name, experiment.about, None, "ordinary" if recipe.makes_base else recipe.method)
    asker, right = Asker(base, questions, 32, device_of("auto")), {}
    with bars(console) as progress:
        for suite in experiment.suites:
            bar = progress.add_task(f"{made.name}, {suite}", total=len(asker.questions(suite)))
            right[suite] = asker.right(row, decoder, suite, advance=lambda count, bar=bar: progress.advance(bar, count))
    return right


def figures_of(experiment: Experiment, right: list[Answers], reference: list[Answers] | None) -> dict:
    """`right`: of each seed. `reference`: those of the fine-tune that it is compared with."""
    suites = {}
    for suite in experiment.suites:
        answers = [of_seed[suite] for of_seed in right]
        suites[suite] = shares_of_seeds(answers)
        if reference:
            suites[suite]["gap"] = apart_of_seeds(answers, [of_seed[suite] for of_seed in reference])
    learnt = json.loads((experiment.folder() / "figures.json").read_text())
    return {"about": experiment.about, "over": experiment.over, "changes": experiment.changes, "suites": suites} | {
        key: learnt[key] for key in ("transcripts", "loss", "seconds", "device")
    }


def _interval(figures: dict) -> list[float]:
    """The gap to the ordinary fine-tune and its interval; empty where there is none."""
    return [figures["gap"][key] for key in ("mean", "low", "high")] if "gap" in figures else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BY_NAME)} (default: all)")
    parser.add_argument("--questions", type=int, default=200, help="of each suite, evenly spread (default: 200)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each, which differ by seed (default: 1)")
    args = parser.parse_args()
    if wrong := set(args.names) - BY_NAME.keys():
        parser.error(f"no such experiment: {', '.join(sorted(wrong))}")
    console, model = Console(stderr=True), fetch(MODEL)
    made_data(AutoTokenizer.from_pretrained(model))
    right: dict[str, list[Answers]] = {}
    for experiment in (BY_NAME[name] for name in args.names or BY_NAME):
        recipes = [experiment.recipe(model, seed) for seed in range(args.seeds)]
        train_all(([BY_NAME[experiment.over].recipe(model)] if experiment.over else []) + recipes, console)
        right[experiment.name] = [answered(recipe, experiment, args.questions, console) for recipe in recipes]
    found = {
        name: figures_of(BY_NAME[name], answers, right.get(BY_NAME[name].against or "")) for name, answers in right.items()
    }
    headline = {
        f"{suite}: {name}": [round(100 * share, 1) for share in (of["accuracy"], *_interval(of))]
        for name, made in found.items()
        for suite, of in made["suites"].items()
    }
    if args.names:
        console.print("A part of the experiments: benchmarks/results/experiments.json stays as it is.")
        print(json.dumps(headline))
        return
    write("accuracy.experiments", console, vars(args), headline, file="experiments", experiments=found)


if __name__ == "__main__":
    main()
