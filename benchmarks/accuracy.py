"""What sharing costs in right answers: base, full fine-tuning, naive sharing, PrefillShare and ICaRus on the task suites.

    make accuracy          (python -m benchmarks.accuracy [--studies tools arithmetic] [--questions N])

 1. Trains, by the recipes in finetuning/recipes/, what is not there yet. The adapters in adapters/ count as PrefillShare's.
 2. Asks test questions, 200 of each suite unless told otherwise, offline: by the definition that
    tests/engine/test_system_smollm.py finds the served system to agree with.
 3. Asks again with only a part of the prompt as base KV: the collapse curve.
 4. Writes docs/accuracy.md and its plot. The last line is JSON.

Hours on two cores. Whatever is done stays in runs/accuracy: started again, it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer

from benchmarks import accuracy_report
from benchmarks.result import write
from benchmarks.small import MODEL, bars
from finetuning import output, subjects
from finetuning.checkpoint import MAY_CHANGE
from finetuning.evaluate import Difference, difference, evenly, offline_answers, score
from finetuning.recipe import Recipe, load, parse
from finetuning.tasks import TASKS, Question, write_transcripts
from finetuning.train import train
from finetuning.transcripts import stop_ids
from kvshare import fingerprint
from kvshare.contract import FILE as CONTRACT_FILE
from kvshare.contract import DecoderContract
from prefillshare.models import fetch

RECIPES = Path("finetuning/recipes")
RUNS = Path("runs/accuracy")
#: As in the sessions that the adapters serve.
OTHERS = 1
#: As decoders are served on GPUs; half the time of float32 here.
DTYPE = torch.bfloat16
#: Memory for the base's KV of the questions, which all rows but one are asked over.
KEPT_BYTES = 6 * 2**30


@dataclass(frozen=True)
class Study:
    """One kind of task. `recipe`: of PrefillShare's adapter; trained on `transcripts` of the suite `data`, each with at most
    `OTHERS` of other decoders' turns before it."""

    name: str
    data: str
    transcripts: int
    suites: tuple[str, ...]

    @property
    def recipe(self) -> Path:
        return RECIPES / f"{self.name}.yaml"


STUDIES = (
    Study("tools", "bfcl_simple_python", 1000, ("bfcl_simple_python", "bfcl_multiple")),
    Study("arithmetic", "arithmetic", 800, ("arithmetic",)),
)

#: What is trained -> what its recipe has that the study's has not.
TWO_EPOCHS = {"epochs": 2, "learning_rate": 7e-4, "lora": {"rank": 8, "alpha": 16, "saved_as": "bfloat16"}}
FULL_WEIGHTS = TWO_EPOCHS | {"weights": "full", "learning_rate": 1e-4, "micro_batch_size": 4}  # of 8: half the memory
TRAININGS: dict[str, dict] = {
    "PrefillShare, LoRA": {},
    "PrefillShare, LoRA, 2 epochs": TWO_EPOCHS,
    "PrefillShare, full": FULL_WEIGHTS,
    "ICaRus, 2 epochs": TWO_EPOCHS | {"method": "icarus"},
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
    Row("PrefillShare, LoRA, 2 epochs", "PrefillShare, LoRA, 2 epochs", "prefillshare"),
    Row("PrefillShare, full", "PrefillShare, full", "prefillshare"),
    Row("ICaRus, 2 epochs", "ICaRus, 2 epochs", "icarus"),
)
#: The rows whose prompts can be base KV in part, and the parts. The base's own KV is base KV.
CURVE = ("base", "naive sharing", "PrefillShare, LoRA")
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


def recipe_of(study: Study, training: str) -> Recipe:
    recipe, changes = load(study.recipe), TRAININGS[training]
    if not changes:
        return recipe
    output = RUNS / study.name / training.replace(", ", "-").replace(" ", "-").lower()
    return parse(recipe.model_dump(mode="json") | changes | {"output": str(output)})


def trained(recipe: Recipe, console: Console) -> Path:
    """The decoder's folder; made if it is not there. Raises SystemExit where one of another recipe, data or base is."""
    folder = Path(recipe.output)
    if not (folder / CONTRACT_FILE).is_file():
        return train(recipe, console)
    made_by, wanted = (
        {key: value for key, value in settings.items() if key not in MAY_CHANGE}
        for settings in (yaml.safe_load((folder / "recipe.yaml").read_text()), recipe.model_dump(mode="json"))
    )
    if made_by != wanted or DecoderContract.read(folder) != output.contract(recipe):
        raise SystemExit(f"{folder} was made by another recipe, from other data or another base; remove it to train it again")
    return folder


class Asker:
    """Answers of rows on suites, kept in files: one per decoder's weights, way of seeing, and questions."""

    def __init__(self, base: Path, questions: int | None, batch_size: int):
        self._base, self._most, self._batch = base, questions, batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._stops = stop_ids(base, self._tokenizer)
        self._frozen = subjects.load_base(base, DTYPE, kept_bytes=KEPT_BYTES)
        self._subject: tuple[tuple, subjects.Subject] | None = None

    def questions(self, suite: str, most: int | None = None) -> list[Question]:
        """`most`: so many of them, evenly spread."""
        questions = TASKS[suite].questions()
        return evenly(questions, min(filter(None, (self._most, most, len(questions)))))

    def right(
        self, row: Row, decoder: Path | None, suite: str, progress: Progress, share: float = 1.0, most: int | None = None
    ) -> list[bool]:
        """Per question, whether its answer is right."""
        questions = self.questions(suite, most)
        seen = row.method if share == 1.0 else f"{row.method}-{share:g}"
        weights = fingerprint.weights(self._base), fingerprint.weights(decoder or self._base)
        key = _digest(*weights, TASKS[suite].max_tokens, str(DTYPE))
        file = RUNS / "answers" / f"{suite}-{seen}-{key}.jsonl"
        given, asked = _lines(file), {q.name: _digest(q.messages) for q in questions}
        missing = [q for q in questions if (q.name, asked[q.name]) not in given]
        missing.sort(key=lambda question: sum(len(message["content"]) for message in question.messages))
        title = f"{row.name}, {suite}" + (f", {share:.0%} base KV" if share < 1 else "")
        bar = progress.add_task(title, total=len(questions), completed=len(questions) - len(missing))
        for first in range(0, len(missing), self._batch):  # answers are kept after every batch
            part = missing[first : first + self._batch]
            answers = offline_answers(
                self._load(row, decoder), TASKS[suite], part, self._tokenizer, stop_ids=self._stops,
                batch_size=self._batch, base_share=share, advance=lambda count: progress.advance(bar, count),
            )  # fmt: skip
            new = {(q.name, asked[q.name]): answer for q, answer in zip(part, answers, strict=True)}
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as stream:
                lines = [{"question": name, "messages": digest, "answer": answer} for (name, digest), answer in new.items()]
                stream.write("".join(json.dumps(line) + "\n" for line in lines))
            given |= new
        progress.remove_task(bar)
        return [q.is_right(given[q.name, asked[q.name]]) for q in questions]

    def _load(self, row: Row, decoder: Path | None) -> subjects.Subject:
        if self._subject is None or self._subject[0] != (decoder, row.method):
            self._subject = None  # two would not fit everywhere
            loaded = subjects.load(row.name, self._base, decoder, row.method, dtype=DTYPE, frozen=self._frozen)
            self._subject = ((decoder, row.method), loaded)
        return self._subject[1]


def _lines(file: Path) -> dict[tuple[str, str], str]:
    """Question and digest of its messages -> answer. A run may have been ended while it wrote a line: it is cut off."""
    if not file.is_file():
        return {}
    text = file.read_text()
    if rest := text[text.rfind("\n") + 1 :]:
        os.truncate(file, len((text[: -len(rest)]).encode()))
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return {(line["question"], line["messages"]): line["answer"] for line in lines}


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def study_of(study: Study, asker: Asker, curve_questions: int, console: Console) -> dict:
    """Per suite: rows and curves."""
    file = Path(load(study.recipe).train)
    if not file.is_file():
        made = write_transcripts([TASKS[study.data]], file, study.transcripts, others=OTHERS)
        console.print(f"{made} transcripts in {file}")
    decoders, trainings = {}, {}
    for training in TRAININGS:
        recipe = recipe_of(study, training)
        decoders[training] = trained(recipe, console)
        trainings[training] = json.loads((decoders[training] / "figures.json").read_text()) | {"epochs": recipe.epochs}
    suites = {}
    if len({training["transcripts"] for training in trainings.values()}) > 1:
        raise SystemExit(f"the decoders of {study.name} have learnt from unequal data: {trainings}")
    with bars(console) as progress:
        for suite in study.suites:
            answers = {row.name: asker.right(row, decoders.get(row.training), suite, progress) for row in ROWS}
            suites[suite] = {"rows": {name: _figures(right, answers[REFERENCE]) for name, right in answers.items()}}
            for name, figures in suites[suite]["rows"].items():
                console.print(f"{suite}, {name}: {100 * figures['accuracy']:.1f} %")
        suites[study.suites[0]]["curve"] = _curve(study.suites[0], asker, decoders, curve_questions, progress)
    return {"suites": suites, "trainings": trainings, "data": {"suite": study.data, "transcripts": study.transcripts}}


def _curve(suite: str, asker: Asker, decoders: dict[str, Path], questions: int, progress: Progress) -> dict[str, list[dict]]:
    """Row -> shares of right answers by share of base KV."""

    def point(row: Row, share: float) -> dict:
        right = asker.right(row, decoders.get(row.training), suite, progress, share, questions)
        return {"share": share} | _shares(right)

    rows = [row for row in ROWS if row.name in CURVE]
    return {row.name: [point(row, share) for share in (SHARES if row.training else SHARES[-1:])] for row in rows}


def _figures(right: Sequence[bool], reference: Sequence[bool]) -> dict:
    return _shares(right) | {"difference": _plain(difference(right, reference))}


def _shares(right: Sequence[bool]) -> dict:
    own = score(right)
    low, high = own.interval
    return {"accuracy": own.share, "low": low, "high": high, "asked": own.asked}


def _plain(against: Difference) -> dict[str, float]:
    low, high = against.interval
    return {"mean": against.mean, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    names = [study.name for study in STUDIES]
    parser.add_argument("--studies", nargs="+", choices=names, default=names, help="kinds of task (default: all)")
    parser.add_argument("--questions", type=int, default=200, help="of each suite, evenly spread; 0: all (default: 200)")
    parser.add_argument("--curve-questions", type=int, default=100, help="per point of the curve (default: 100)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions answered together (default: 32)")
    args = parser.parse_args()
    console = Console(stderr=True)
    asker = Asker(fetch(MODEL), args.questions or None, args.batch_size)
    studies = {s.name: study_of(s, asker, args.curve_questions, console) for s in STUDIES if s.name in args.studies}
    headline = {
        f"{suite}: {name}": round(100 * figures["accuracy"], 1)
        for study in studies.values()
        for suite, found in study["suites"].items()
        for name, figures in found["rows"].items()
    }
    if len(studies) < len(STUDIES):
        console.print("A part of the study: docs/accuracy.md and benchmarks/results/accuracy.json stay as they are.")
        print(json.dumps(headline))
        return
    result = write("accuracy", console, vars(args), headline, studies=studies)
    accuracy_report.write(result)


if __name__ == "__main__":
    main()
