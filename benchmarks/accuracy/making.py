"""Training what an experiment is about: by its recipe alone, or by a lever that is no feature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.accuracy.hypotheses import BY_NAME, JOINT_TASKS, KV_MAP_RANK, Experiment, data_file
from benchmarks.accuracy.levers import joint
from benchmarks.accuracy.levers.distilled import Distilled
from benchmarks.accuracy.levers.joint import Joint
from benchmarks.accuracy.levers.kv_maps import Mapping
from prefillshare.finetuning import transcripts
from prefillshare.finetuning.recipe import Recipe, is_whole, parse
from prefillshare.finetuning.several import train_all
from prefillshare.finetuning.tokenizers import tokenizer_of
from prefillshare.finetuning.train import train


def make(experiment: Experiment, recipes: Sequence[Recipe], model: Path, console: Console) -> None:
    """Train what is not there yet of an experiment, and of what it stands on. `recipes`: one per seed."""
    if experiment.over:
        _make_first(experiment.over, model, console)
    for recipe in recipes:
        if experiment.lever and not is_whole(Path(recipe.output)):
            _LEVERS[experiment.lever](experiment, recipe, model, console)
    train_all(recipes, console)


def _make_first(name: str, model: Path, console: Console) -> None:
    make(BY_NAME[name], [BY_NAME[name].recipe(model)], model, console)


def _distilled(experiment: Experiment, recipe: Recipe, model: Path, console: Console) -> None:
    _make_first(experiment.against, model, console)
    train(recipe, console, Distilled(recipe, BY_NAME[experiment.against].folder()))


def _mapped(experiment: Experiment, recipe: Recipe, model: Path, console: Console) -> None:
    decoder = Mapping(recipe, KV_MAP_RANK)
    decoder.save_maps(train(recipe, console, decoder))


def _joint(experiment: Experiment, recipe: Recipe, model: Path, console: Console) -> None:
    """Trains into a folder of its own, from which the base and the decoders are taken."""
    folder = Path(recipe.output) / "training"
    training = parse(recipe.model_dump(mode="json") | {"method": "ordinary", "output": str(folder)})
    adapters = {task: BY_NAME[f"{experiment.name}-{task}"] for task in JOINT_TASKS}
    if not is_whole(folder):
        tasks = {ids: task for task in JOINT_TASKS for ids in _ids(task, training)}
        train(training, console, Joint(training, tasks, {task: of.recipe(model) for task, of in adapters.items()}))
    joint.prefill_module(folder, recipe)
    for task, of in adapters.items():
        joint.decoder(folder, task, of.recipe(model))


def _ids(task: str, recipe: Recipe) -> list[tuple[int, ...]]:
    base = Path(recipe.base)
    tokenizer = tokenizer_of(recipe.base, recipe.template_text)
    examples, _ = transcripts.read(data_file(task), tokenizer, transcripts.stop_ids(base, tokenizer), recipe.max_tokens)
    return [example.token_ids for example in examples]


_LEVERS: dict[str, Callable[[Experiment, Recipe, Path, Console], None]] = {
    "distilled": _distilled, "mapped": _mapped, "joint": _joint,
}  # fmt: skip
