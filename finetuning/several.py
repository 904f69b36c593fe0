"""Several recipes, one after the other. What is there already is left alone: a list that was interrupted goes on where it was
when it is started again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prefillshare.finetuning.recipe import Recipe, check_files, is_whole
from prefillshare.kvshare.errors import ConfigError


def check(recipes: Sequence[Recipe]) -> None:
    """Raises ConfigError for what a run could not use, before any begins. A recipe may name as its base what an earlier one
    makes."""
    outputs: set[Path] = set()
    for recipe in recipes:
        if Path(recipe.output) in outputs:
            raise ConfigError(f"two recipes write {recipe.output}", field="output", fix="give each a folder of its own")
        if Path(recipe.base) not in outputs or is_whole(Path(recipe.base)):
            check_files(recipe)
        outputs.add(Path(recipe.output))


def train_all(recipes: Sequence[Recipe], console: Console) -> list[Path]:
    """Returns the folders. Raises ConfigError for what cannot be trained, and for a folder that another recipe has made. Call
    `check` first: it finds before any training what can be found by then."""
    from prefillshare.finetuning import output
    from prefillshare.finetuning.train import train

    folders = []
    for number, recipe in enumerate(recipes, 1):
        console.print(f"{number} of {len(recipes)}: {recipe.output}")
        if is_whole(Path(recipe.output)):
            output.check_made_by(recipe)
            console.print("is there already")
        else:
            train(recipe, console)
        folders.append(Path(recipe.output))
    console.print(_table(recipes))
    return folders


def _table(recipes: Sequence[Recipe]) -> Table:
    from prefillshare.finetuning.output import FIGURES

    table = Table("folder", "method", "weights", "transcripts", "loss at the end", "minutes")
    for recipe in recipes:
        figures = json.loads((Path(recipe.output) / FIGURES).read_text())
        numbers = f"{figures['transcripts']:,}", f"{figures['loss']:.4f}", f"{figures['seconds'] / 60:.1f}"
        table.add_row(recipe.output, recipe.method, recipe.weights, *numbers)
    return table
