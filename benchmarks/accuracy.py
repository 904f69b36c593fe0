"""What sharing costs in right answers: base, full fine-tuning, naive sharing, PrefillShare and ICaRus on the task suites.

    make accuracy          (python -m benchmarks.accuracy [--studies tools arithmetic] [--questions N])

 1. Trains, by the recipes in finetuning/recipes/, what is not there yet. The adapters in adapters/ count as PrefillShare's.
 2. Asks every test question, offline: by the definition that tests/engine/test_system_smollm.py finds the served system
    to agree with.
 3. Asks again with only a part of the prompt as base KV: the collapse curve.
 4. Writes docs/accuracy.md and its plot. The last line is JSON.

Hours on two cores. Whatever is done stays in runs/accuracy: started again, it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import TaskID
from transformers import AutoTokenizer

from benchmarks import accuracy_report
from benchmarks.result import write
from benchmarks.small import bars
from finetuning import subjects
from finetuning.evaluate import Difference, difference, offline_answers, score
from finetuning.recipe import Recipe, load, parse
from finetuning.tasks import TASKS, Question, write_transcripts
from finetuning.train import train
from finetuning.transcripts import stop_ids
from kvshare.contract import FILE as CONTRACT_FILE
from prefillshare.models import fetch

RECIPES = Path("finetuning/recipes")
RUNS = Path("runs/accuracy")
MODEL = "smollm2-135m-instruct"
#: Answers are kept after every so many questions.
CHUNK = 48


@dataclass(frozen=True)
class Study:
    """One kind of task. `recipe`: of PrefillShare's adapter; `data`: (suite, transcripts) it is trained on."""

    name: str
    data: tuple[str, int]
    suites: tuple[str, ...]

    @property
    def recipe(self) -> Path:
        return RECIPES / f"{self.name}.yaml"


STUDIES = (
    Study("tools", ("bfcl_simple_python", 1000), ("bfcl_simple_python", "bfcl_multiple")),
    Study("arithmetic", ("arithmetic", 1200), ("arithmetic",)),
)

#: What is trained -> what its recipe has that the study's has not.
FULL_WEIGHTS = {"weights": "full", "learning_rate": 1e-4}
TRAININGS: dict[str, dict] = {
    "PrefillShare, LoRA": {},
    "PrefillShare, full": FULL_WEIGHTS,
    "ICaRus": {"method": "icarus"},
    "full fine-tuning": FULL_WEIGHTS | {"method": "ordinary"},
}


@dataclass(frozen=True)
class Row:
    """A decoder (None: the base) and how it sees context."""

    name: str
    training: str | None
    method: str


REFERENCE = "full fine-tuning"
ROWS = (
    Row("base", None, "ordinary"),
    Row(REFERENCE, REFERENCE, "ordinary"),
    Row("naive sharing", REFERENCE, "prefillshare"),
    Row("PrefillShare, LoRA", "PrefillShare, LoRA", "prefillshare"),
    Row("PrefillShare, full", "PrefillShare, full", "prefillshare"),
    Row("ICaRus", "ICaRus", "icarus"),
)
#: The rows whose prompts can be base KV in part, and the parts.
CURVE = ("naive sharing", "PrefillShare, LoRA")
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


def recipe_of(study: Study, training: str) -> Recipe:
    recipe, changes = load(study.recipe), TRAININGS[training]
    if not changes:
        return recipe
    output = RUNS / study.name / training.replace(", ", "-").replace(" ", "-").lower()
    return parse(recipe.model_dump(mode="json") | changes | {"output": str(output)})


def trained(recipe: Recipe, console: Console) -> Path:
    """The decoder's folder; made if it is not there. Raises SystemExit where another recipe's is."""
    folder = Path(recipe.output)
    if not (folder / CONTRACT_FILE).is_file():
        return train(recipe, console)
    made_by = yaml.safe_load((folder / "recipe.yaml").read_text())
    if made_by != recipe.model_dump(mode="json"):
        raise SystemExit(f"{folder} was made by another recipe than this one; remove it to train it again")
    return folder


class Asker:
    """Answers of rows on suites, kept in files: one per decoder's weights, way of seeing and suite."""

    def __init__(self, base: Path, questions: int | None, batch_size: int):
        self._base, self._most, self._batch = base, questions, batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._stops = stop_ids(base, self._tokenizer)
        self._subject: tuple[tuple, subjects.Subject] | None = None

    def questions(self, suite: str, most: int | None = None) -> list[Question]:
        return TASKS[suite].questions()[: min(filter(None, (self._most, most)), default=None)]

    def right(self, row: Row, decoder: Path | None, suite: str, progress, share: float = 1.0, most: int | None = None) -> list[bool]:
        """Per question, whether its answer is right."""
        questions = self.questions(suite, most)
        seen = row.method if share == 1.0 else f"{row.method}-{share:g}"
        file = RUNS / "answers" / f"{suite}-{seen}-{_digest(decoder)}.jsonl"
        given = _lines(file)
        bar: TaskID = progress.add_task(f"{row.name}, {suite}" + (f", {share:.0%} shared" if share < 1 else ""),
                                        total=len(questions), completed=min(len(given), len(questions)))  # fmt: skip
        while len(given) < len(questions):
            part = questions[len(given) : len(given) + CHUNK]
            answers = offline_answers(
                self._load(row, decoder), TASKS[suite], part, self._tokenizer, stop_ids=self._stops,
                batch_size=self._batch, base_share=share, advance=lambda count: progress.advance(bar, count),
            )  # fmt: skip
            new = [{"question": q.name, "answer": a} for q, a in zip(part, answers, strict=True)]
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as stream:
                stream.write("".join(json.dumps(line) + "\n" for line in new))
            given += new
        progress.remove_task(bar)
        if [line["question"] for line in given[: len(questions)]] != [q.name for q in questions]:
            raise SystemExit(f"{file} has answers to other questions; remove it")
        return [q.is_right(line["answer"]) for q, line in zip(questions, given, strict=False)]

    def _load(self, row: Row, decoder: Path | None) -> subjects.Subject:
        if self._subject is None or self._subject[0] != (decoder, row.method):
            self._subject = None  # two would not fit everywhere
            self._subject = ((decoder, row.method), subjects.load(row.name, self._base, decoder, row.method))
        return self._subject[1]


def _lines(file: Path) -> list[dict]:
    """Whole lines only: a run may have been ended while it wrote."""
    if not file.is_file():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _digest(decoder: Path | None) -> str:
    """Of a decoder's weights."""
    if decoder is None:
        return "base"
    (file,) = [f for f in decoder.glob("*model.safetensors")]
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def study_of(study: Study, asker: Asker, curve_questions: int, console: Console) -> dict:
    """Per suite: rows and curves."""
    data, count = study.data
    file = Path(load(study.recipe).train)
    if not file.is_file():
        made = write_transcripts([TASKS[data]], file, count)
        console.print(f"{made} transcripts in {file}")
    decoders, trainings = {}, {}
    for training in TRAININGS:
        recipe = recipe_of(study, training)
        decoders[training] = trained(recipe, console)
        trainings[training] = json.loads((decoders[training] / "figures.json").read_text())
    suites = {}
    with bars(console) as progress:
        for suite in study.suites:
            answers = {row.name: asker.right(row, decoders.get(row.training), suite, progress) for row in ROWS}
            suites[suite] = {"rows": {name: _figures(right, answers[REFERENCE]) for name, right in answers.items()}}
            for name, figures in suites[suite]["rows"].items():
                console.print(f"{suite}, {name}: {100 * figures['accuracy']:.1f} %")
        suite = study.suites[0]
        suites[suite]["curve"] = {
            row.name: [
                (share, sum(right) / len(right))
                for share in SHARES
                for right in [asker.right(row, decoders[row.training], suite, progress, share, curve_questions)]
            ]
            for row in ROWS if row.name in CURVE
        }  # fmt: skip
    return {"suites": suites, "trainings": trainings, "data": {"suite": data, "transcripts": count}}


def _figures(right: Sequence[bool], reference: Sequence[bool]) -> dict:
    own, against = score(right), difference(right, reference)
    low, high = own.interval
    return {"accuracy": own.share, "low": low, "high": high, "asked": own.asked, "difference": _plain(against)}


def _plain(against: Difference) -> dict[str, float]:
    low, high = against.interval
    return {"mean": against.mean, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    names = [study.name for study in STUDIES]
    parser.add_argument("--studies", nargs="+", choices=names, default=names, help="kinds of task (default: all)")
    parser.add_argument("--questions", type=int, help="ask only the first of each suite (default: all)")
    parser.add_argument("--curve-questions", type=int, default=150, help="questions per point of the curve (default: 150)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions answered together (default: 32)")
    args = parser.parse_args()
    console = Console(stderr=True)
    asker = Asker(fetch(MODEL, Path("models") / MODEL), args.questions, args.batch_size)
    studies = {s.name: study_of(s, asker, args.curve_questions, console) for s in STUDIES if s.name in args.studies}
    headline = {
        f"{suite}: {name}": round(100 * figures["accuracy"], 1)
        for study in studies.values()
        for suite, found in study["suites"].items()
        for name, figures in found["rows"].items()
    }
    result = write("accuracy", console, vars(args), headline, studies=studies)
    accuracy_report.write(result)


if __name__ == "__main__":
    main()
