"""The commands of `prefillshare` that make and measure decoders; the command line finds them by entry point."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prefillshare.arguments import BaseFolder, ChatTemplate, DecoderFolder, checked
from prefillshare.kvshare import chat_template as chat_templates
from prefillshare.kvshare import given_files
from prefillshare.kvshare.errors import ConfigError, ConnectionLost, DeadlineExceeded, InvalidInput

BASE = Path("models/smollm2-135m-instruct")
DTYPES = ("float32", "bfloat16")
#: Seconds within which a running deployment has to answer.
ANSWER_S = 6.0

def train(
    recipes: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECIPE...", help="Training recipes (YAML); every key: docs/training.md.",
            callback=checked(given_files.readable),
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the decoder; with a single recipe.", show_default="the recipe's",
            callback=checked(given_files.made_folder),
        ),
    ] = None,
) -> None:
    """Train decoders for a shared cache, or a base for decoders to share: adapters or full weights, by each recipe's method.

    Several recipes are trained one after the other; a later one may name as its base what an earlier one makes. A run that
    was interrupted goes on from its last checkpoint when it is started again, and what is trained already is left alone. The
    output folders can be served as they are; `log.csv` in each holds every step's loss.
    """
    from prefillshare.finetuning.recipe import load

    chosen = [load(recipe) for recipe in recipes]
    if output and len(chosen) > 1:
        raise InvalidInput("of one recipe only", field="--output", fix="set `output` in each recipe")
    chosen = [recipe.model_copy(update={"output": str(output)}) if output else recipe for recipe in chosen]
    from prefillshare.finetuning import several

    several.check(chosen)  # before transformers and PEFT are imported
    _quiet()
    for folder in several.train_all(chosen, Console(stderr=True)):
        typer.echo(folder)


def data(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="Suites to make training data for, e.g. arithmetic.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write.", callback=checked(given_files.writable))],
    count: Annotated[int, typer.Option(min=1, help="Most transcripts per suite.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Determines the made-up problems and the choice of real ones.")] = 0,
    split: Annotated[str, typer.Option(help="train or validation; the two have nothing in common.")] = "train",
    others: Annotated[
        int, typer.Option(min=0, help="Most turns of other decoders before each transcript, which are not learnt.")
    ] = 0,
    together: Annotated[
        int, typer.Option(min=1, help="Most transcripts, of different suites, in one, all of which is learnt: for a base.")
    ] = 1,
) -> None:
    """Make training data for task suites. It is checked to hold none of their test questions."""
    chosen = _tasks(tasks)
    from prefillshare.finetuning.tasks import SPLITS, write_transcripts

    if split not in SPLITS:
        raise InvalidInput(f"unknown split {split!r}", field="--split", fix=f"use one of {', '.join(SPLITS)}")
    typer.echo(f"{write_transcripts(chosen, output, count, seed, split, others, together)} transcripts in {output}")


def evaluate(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="Suites to answer, e.g. bfcl_simple_python.")],
    base: Annotated[Path | None, typer.Option(help="Folder of the base.", show_default=str(BASE))] = None,
    chat_template: ChatTemplate = None,
    decoder: Annotated[
        Path | None,
        typer.Option(help="Folder of the decoder.", show_default="the base itself", callback=checked(given_files.weights)),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How it sees context: prefillshare, icarus or ordinary.", show_default="as the decoder was trained"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first questions.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered together.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: as it is served.")] = "float32",
    served: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Ask a running deployment (gRPC) instead.")] = None,
    name: Annotated[str | None, typer.Option(help="With --served: the decoder's name there.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="File for the questions' names and the answers (JSONL).", callback=checked(given_files.writable)),
    ] = None,
) -> None:
    """Score a decoder on task suites, with 95 % intervals. The last line of output is one JSON object."""
    base = base or BASE
    if served:
        _check_served(served, name)
    else:
        given_files.model(base, "--base")
        if decoder:
            template = chat_templates.text_of_given(chat_template, "--chat-template")
            given_files.decoder(decoder, base, "--decoder", template)
        _known("--dtype", dtype, DTYPES)
    chosen = _tasks(tasks)
    if served:
        ask = _served(served, name, batch_size)
    else:
        ask = _offline(base, chat_template, decoder, method, batch_size, device, dtype)
    from prefillshare.finetuning.evaluate import score
    from prefillshare.finetuning.progress import shown

    console, figures, lines = Console(stderr=True), {}, []
    with shown(console) as progress:
        for task in chosen:
            questions = task.questions()[:limit]
            bar = progress.add_task(task.name, len(questions))
            given = ask(task, questions, lambda count, bar=bar: progress.advance(bar, count))
            right = [question.is_right(answer) for question, answer in zip(questions, given, strict=True)]
            result = score(right)
            console.print(f"{task.name}: {result} % of {result.asked}")
            low, high = result.interval
            figures[task.name] = {"accuracy": round(result.share, 4), "low": round(low, 4), "high": round(high, 4),
                                  "asked": result.asked}  # fmt: skip
            lines += [{"question": q.name, "answer": a, "right": r} for q, a, r in zip(questions, given, right, strict=True)]
    if answers:
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(json.dumps(figures))


def profile(
    decoder: DecoderFolder,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Transcripts like those it will serve (JSONL, docs/training.md).",
            callback=checked(given_files.lines),
        ),
    ],
    base: BaseFolder = BASE,
    chat_template: ChatTemplate = None,
    examples: Annotated[int, typer.Option(min=2, help="Number of transcripts to use, evenly spread over the file.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=16, help="Longer transcripts are cut.")] = 1024,
    task: Annotated[list[str] | None, typer.Option(metavar="SUITE", help="Also score the frontier on this suite.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="With --task: questions to ask.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: as it is served.")] = "float32",
) -> None:
    """Find which layers of a prompt a decoder should compute itself over the base's KV (sharing mode droidspeak).

    Writes layer_profile.json and a plot beside the decoder's KV contract. A run that was interrupted goes on when it is
    started again. The last line of output is one JSON object: the frontier, layers -> divergence.
    """
    given_files.decoder(decoder, base, "DECODER")
    given_files.writable_folder(decoder, "DECODER")
    _known("--dtype", dtype, DTYPES)
    suites = _tasks(task) if task else []
    import torch

    from prefillshare.finetuning import layer_profile, layer_profile_report, subjects, transcripts
    from prefillshare.finetuning.methods import METHODS
    from prefillshare.finetuning.recipe import device_of
    from prefillshare.finetuning.tokenizers import tokenizer_of

    _quiet()
    template = chat_templates.text_of_given(chat_template, "--chat-template")
    console, tokenizer = Console(stderr=True), tokenizer_of(base, template)
    stops = transcripts.stop_ids(base, tokenizer)
    found, _ = transcripts.read(data, tokenizer, stops, max_tokens, field="--data")
    where = device_of(device)
    how = {"dtype": getattr(torch, dtype), "device": where, "template": template}
    subject = subjects.load(decoder.name, base, decoder, METHODS["prefillshare"], **how)
    made = layer_profile.profile(base, decoder, subject, data, found, examples, console)
    if suites:
        made = layer_profile.scored(made, subject, suites, limit, tokenizer, stops, where, console)
    file = layer_profile.keep(made, decoder)
    console.print(layer_profile_report.table(made))
    console.print(f"{file}, {layer_profile_report.plot(made, decoder)}")
    print(json.dumps({point.layers: round(point.divergence, 5) for point in made.frontier}))


def _offline(
    base: Path, given: str | None, decoder: Path | None, method: str | None, batch_size: int, device: str, dtype: str
):
    import torch

    from prefillshare.finetuning import subjects
    from prefillshare.finetuning.evaluate import offline_answers
    from prefillshare.finetuning.methods import METHODS
    from prefillshare.finetuning.recipe import device_of
    from prefillshare.finetuning.tokenizers import tokenizer_of
    from prefillshare.finetuning.transcripts import stop_ids

    _quiet()
    template = chat_templates.text_of_given(given, "--chat-template")
    if method is not None:
        _known("--method", method, METHODS)
    sees, where = subjects.method_for(decoder, method), device_of(device)
    Console(stderr=True).print(f"{decoder or base}, which sees context by method {sees}, on {where}")
    how = {"dtype": getattr(torch, dtype), "device": where, "template": template}
    subject = subjects.load(str(sees), base, decoder, sees, **how)
    tokenizer = tokenizer_of(base, template)
    options = {"stop_ids": stop_ids(base, tokenizer), "batch_size": batch_size, "device": where}
    return lambda task, questions, advance: offline_answers(subject, task, questions, tokenizer, advance=advance, **options)


def _known(field: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise InvalidInput(f"unknown value {value!r}", field=field, fix=f"use one of {', '.join(allowed)}")


def _quiet() -> None:
    """transformers has bars of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _check_served(address: str, name: str | None) -> None:
    """Raises ConfigError unless a deployment answers there, and InvalidInput unless it serves the decoder."""
    if not name:
        raise InvalidInput("required with --served", field="--name", fix="give the decoder's name in the deployment")
    from prefillshare.client import Client

    with Client(address, timeout_s=ANSWER_S) as client:
        try:
            there = [decoder.name for decoder in client.decoders()]
        except (ConnectionLost, DeadlineExceeded) as error:
            fix = "give HOST:PORT of its gRPC surface"
            raise ConfigError(f"no deployment answers at {address}: {error.message}", field="--served", fix=fix) from None
    _known("--name", name, there)


def _served(address: str, name: str, at_once: int):
    from prefillshare.client import Client
    from prefillshare.finetuning.evaluate import served_answers

    def ask(task, questions, advance):
        with Client(address) as client:
            return served_answers(client, name, task, questions, at_once=at_once, advance=advance)

    return ask


def _tasks(names: list[str]) -> list:
    try:
        import bfcl_eval  # noqa: F401
        import hassil  # noqa: F401
        import home_assistant_intents  # noqa: F401
        import reasoning_gym  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the task suites need {error.name}",
            fix="pip install 'prefillshare[eval]' and pip install --no-deps -r requirements/data.lock",
        ) from None
    from prefillshare.finetuning.tasks import TASKS

    if wrong := [name for name in names if name not in TASKS]:
        raise InvalidInput(f"unknown suite {wrong[0]!r}", field="TASK", fix=f"use one of {', '.join(TASKS)}")
    return [TASKS[name] for name in names]
