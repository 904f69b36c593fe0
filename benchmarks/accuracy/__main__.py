"""What sharing costs in right answers: base, full fine-tuning, naive sharing, DroidSpeak, PrefillShare and ICaRus on the task
suites.

    make accuracy          (python -m benchmarks.accuracy [--studies tools arithmetic] [--questions N] [--jobs N])

 1. Trains the decoders that are not there yet, by the recipes in finetuning/recipes/. The adapters in adapters/ are
    PrefillShare's.
 2. Profiles the layers of the ordinary fine-tunes, for DroidSpeak.
 3. Asks test questions, 200 of each suite unless told otherwise, offline; tests/engine/smollm/test_exact_turns.py checks that
    the served system gives the same answers. For the collapse curve, questions are asked again with only a part of the
    prompt as base KV.
 4. Writes docs/accuracy.md and its plot. The last line is JSON.

It takes many hours on two cores, minutes on a GPU with --jobs 8. What is done is kept in runs/accuracy, so that a run that is
started again goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.accuracy import report
from benchmarks.accuracy.asker import KEPT_BYTES, Asker
from benchmarks.accuracy.figures import apart, shares
from benchmarks.accuracy.rows import CURVE, OTHERS, PROFILED, REFERENCE, ROWS, SHARES, STUDIES, TRAININGS, Row, Study, Training
from benchmarks.shared.result import write
from benchmarks.shared.small import MODEL, bars
from prefillshare.finetuning import layer_profile, layer_profile_report, output, transcripts
from prefillshare.finetuning.recipe import Recipe, device_of, is_whole, load
from prefillshare.finetuning.tasks import TASKS, write_transcripts
from prefillshare.finetuning.train import train
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.layer_profile import FILE as PROFILE_FILE
from prefillshare.models import fetch

#: Transcripts on which a decoder's layers are profiled, and their seed, which differs from the training data's.
PROFILE_TRANSCRIPTS, PROFILE_SEED = 12, 1


@dataclass(frozen=True)
class Settings:
    """What every piece of work needs to know."""

    base: Path
    device: str
    questions: int | None
    curve_questions: int
    batch_size: int
    jobs: int


@dataclass(frozen=True)
class Work:
    """An independent piece of the study, whose outcome is in files."""

    title: str
    function: Callable
    arguments: tuple


def all_done(work: Iterable[Work], settings: Settings, pool: Executor | None, console: Console) -> None:
    """Do the pieces one after the other, each with its own progress bar, or in the pool's processes."""
    work = list(work)
    if pool is None:
        for piece in work:
            console.print(piece.title)
            piece.function(settings, console, *piece.arguments)
        return
    with bars(console) as progress:
        bar = progress.add_task("pieces of work", total=len(work))
        begun = {pool.submit(_quietly, piece, settings): piece for piece in work}
        for future in as_completed(begun):
            future.result()
            progress.console.print(f"done: {begun[future].title}")
            progress.advance(bar)


def _quietly(piece: Work, settings: Settings) -> None:
    """Do a piece in a process of the pool, and give its GPU memory back for the others."""
    piece.function(settings, Console(quiet=True), *piece.arguments)
    if settings.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def made_data(study: Study, console: Console) -> None:
    """Make the study's transcripts, to train on and to profile with, if they are not there."""
    tasks, file = [TASKS[study.data]], Path(load(study.recipe).train)
    if not file.is_file():
        made = write_transcripts(tasks, file, study.transcripts, others=OTHERS)
        console.print(f"{made} transcripts in {file}")
    if not (file := _profile_data(study)).is_file():
        write_transcripts(tasks, file, 2 * PROFILE_TRANSCRIPTS, PROFILE_SEED, "validation", OTHERS)


def _profile_data(study: Study) -> Path:
    return Path(load(study.recipe).train).with_name(f"{study.name}-profile.jsonl")


def trained(settings: Settings, console: Console, recipe: Recipe) -> Path:
    """The decoder's folder; the decoder is trained if it is not there."""
    folder = Path(recipe.output)
    if not is_whole(folder):
        return train(recipe.model_copy(update={"device": settings.device} | _for(settings.device, recipe)), console)
    output.check_made_by(recipe)
    return folder


def _for(device: str, recipe: Recipe) -> dict:
    """Recipe changes for a GPU, which computes KV faster than a disk returns it and takes more transcripts in one pass."""
    if device != "cuda":
        return {}
    return {"base_kv_gib": 0.0, "micro_batch_size": recipe.batch_size // (1 if recipe.how.base_prompt else 2)}


def profiled(settings: Settings, console: Console, study: Study, training: Training) -> None:
    """Measure which layers an ordinary fine-tune should compute itself, on transcripts that it has not learnt from."""
    recipe = training.recipe(study)
    folder, file = Path(recipe.output), _profile_data(study)
    if (folder / PROFILE_FILE).is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    stops = transcripts.stop_ids(settings.base, tokenizer)
    found, _ = transcripts.read(file, tokenizer, stops, recipe.max_tokens)
    subject = _asker(settings).subject(Row("profile", "", training.name, "prefillshare"), folder)
    made = layer_profile.profile(settings.base, folder, subject, file, found, PROFILE_TRANSCRIPTS, console)
    layer_profile.keep(made, folder)
    console.print(layer_profile_report.table(made))


def asked(settings: Settings, console: Console, study: Study, row: Row, suite: str, share: float, most: int | None) -> None:
    with bars(console) as progress:
        title = f"{row.name}, {suite}" + (f", {share:.0%} base KV" if share < 1 else "")
        bar = progress.add_task(title, total=len(_asker(settings).questions(suite, most)))
        answer(settings, study, row, suite, share, most, lambda count: progress.advance(bar, count))


def answer(settings: Settings, study: Study, row: Row, suite: str, share: float = 1.0, most=None, advance=lambda _: None):
    decoder = _folder(TRAININGS[row.training], study) if row.training else None
    return _asker(settings).right(row, decoder, suite, share, most, advance)


@cache
def _asker(settings: Settings) -> Asker:
    return Asker(settings.base, settings.questions, settings.batch_size, settings.device, KEPT_BYTES // settings.jobs)


def trained_for(study: Study) -> list[Training]:
    """The trainings whose decoders are there."""
    return [training for training in TRAININGS.values() if is_whole(_folder(training, study))]


def check_comparable(studies: Iterable[Study]) -> None:
    """Called before any question is asked. Raises ConfigError if a decoder was made by another recipe or from other data, and
    SystemExit if there is no reference to compare with."""
    for study in studies:
        if TRAININGS[REFERENCE] not in (there := trained_for(study)):
            raise SystemExit(f"{study.name}: {REFERENCE} has not been trained, and all else is compared with it")
        for training in there:
            output.check_made_by(training.recipe(study))
        seen = {training.name: _learnt(training, study)["transcripts"] for training in there}
        if len(set(seen.values())) > 1:
            raise SystemExit(f"the decoders of {study.name} have learnt from unequal data; transcripts: {seen}")


def _learnt(training: Training, study: Study) -> dict:
    return json.loads((_folder(training, study) / "figures.json").read_text())


def rows_of(study: Study) -> list[Row]:
    """The rows whose decoders are there."""
    there = {None, *(training.name for training in trained_for(study))}
    return [row for row in ROWS if row.training in there]


def points_of(study: Study) -> list[tuple[Row, float]]:
    """(row, share of base KV) of the collapse curve's points, which are measured on the study's first suite."""
    return [(row, share) for row in rows_of(study) if row.name in CURVE for share in (SHARES if row.training else SHARES[-1:])]


def _folder(training: Training, study: Study) -> Path:
    return Path(training.recipe(study).output)


def trainings_of(study: Study) -> list[Work]:
    return [Work(f"{study.name}: {name}", trained, (training.recipe(study),)) for name, training in TRAININGS.items()]


def questions_of(study: Study, settings: Settings) -> list[Work]:
    whole = [(row, suite, 1.0, None) for suite in study.suites for row in rows_of(study)]
    # A share of 1 is in `whole` already.
    parts = [(row, study.suites[0], share, settings.curve_questions) for row, share in points_of(study) if share < 1]
    return [
        Work(f"{study.name}: {row.name}, {suite}, {share:.0%}", asked, (study, row, suite, share, most))
        for row, suite, share, most in sorted(whole + parts, key=lambda asked: not asked[0].all_weights)
    ]


def figures_of(study: Study, settings: Settings) -> dict:
    """The study's figures, from what has been done: rows and curves by suite, trainings, data and profiles."""
    trainings = {}
    for training in trained_for(study):
        trainings[training.name] = _learnt(training, study) | {"epochs": training.recipe(study).epochs}
    suites = {}
    for suite in study.suites:
        answers = {row.name: answer(settings, study, row, suite) for row in rows_of(study)}
        suites[suite] = {"rows": {row.name: _figures(row, answers) for row in rows_of(study)}}
    curve: dict[str, list[dict]] = {}
    for row, share in points_of(study):
        right = answer(settings, study, row, study.suites[0], share, settings.curve_questions)
        curve.setdefault(row.name, []).append({"share": share} | shares(right))
    suites[study.suites[0]]["curve"] = curve
    profiles = {
        training.name: json.loads((_folder(training, study) / PROFILE_FILE).read_text())
        for training in trained_for(study)
        if training.name in PROFILED
    }
    data = {"suite": study.data, "transcripts": study.transcripts}
    missing = [name for name in TRAININGS if name not in trainings]
    return {"suites": suites, "trainings": trainings, "missing": missing, "data": data, "profiles": profiles}


def _figures(row: Row, answers: dict[str, Sequence[bool]]) -> dict:
    """A row's figures. `answers`: row -> whether each answer is right. `gap`: what sharing costs."""
    right = answers[row.name]
    compared = {"difference": apart(right, answers[REFERENCE])}
    if row.ordinary in answers:
        compared["gap"] = apart(right, answers[row.ordinary])
    return shares(right) | compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="kinds of task (default: all)")
    parser.add_argument("--questions", type=int, default=200, help="of each suite, evenly spread; 0: all (default: 200)")
    parser.add_argument("--curve-questions", type=int, default=100, help="per point of the curve (default: 100)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions answered together (default: 32)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--only-trained", action="store_true", help="train nothing: the page names the rows that are missing")
    parser.add_argument("--jobs", type=int, default=1, help="trainings, and rows asked, at the same time (default: 1)")
    args = parser.parse_args()
    console = Console(stderr=True)
    settings = Settings(
        fetch(MODEL), device_of(args.device), args.questions or None, args.curve_questions, args.batch_size, args.jobs
    )
    studies = [STUDIES[name] for name in args.studies]
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    pool = None
    if args.jobs > 1:
        pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    try:
        for study in studies:
            made_data(study, console)
        if not args.only_trained:
            all_done([work for study in studies for work in trainings_of(study)], settings, pool, console)
        check_comparable(studies)
        profiles = [
            Work(f"{study.name}: layers of {training.name}", profiled, (study, training))
            for study in studies
            for training in trained_for(study)
            if training.name in PROFILED
        ]
        questions = [work for study in studies for work in questions_of(study, settings)]
        needs_profile = [work for work in questions if work.arguments[1].layers]
        all_done([*profiles, *(work for work in questions if work not in needs_profile)], settings, pool, console)
        all_done(needs_profile, settings, pool, console)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    found = {study.name: figures_of(study, settings) for study in studies}
    headline = {
        f"{suite}: {name}": round(100 * figures["accuracy"], 1)
        for study in found.values()
        for suite, of_suite in study["suites"].items()
        for name, figures in of_suite["rows"].items()
    }
    gaps = {
        suite: {name: round(100 * row["gap"]["mean"], 1) for name, row in of_suite["rows"].items() if "gap" in row}
        for study in found.values()
        for suite, of_suite in study["suites"].items()
    }
    if len(studies) < len(STUDIES):
        console.print("A part of the study: docs/accuracy.md and benchmarks/results/accuracy.json stay as they are.")
        print(json.dumps(headline))
        return
    report.write(write("accuracy", console, vars(args), headline, studies=found, gap_points=gaps))


if __name__ == "__main__":
    main()
