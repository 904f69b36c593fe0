"""Joint training: one prefill module for all tasks, into which the gradients of every task's loss flow, and a decoder per task.

The prefill module is the model with an adapter. A decoder is the prefill module with an adapter of its own, over KV that the
prefill module makes of the prompt. Trained are all adapters at once; afterwards the prefill module is frozen, as a new base.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml

from prefillshare.finetuning import conditioned, output
from prefillshare.finetuning.conditioned import LayersKV
from prefillshare.finetuning.methods import METHODS
from prefillshare.finetuning.recipe import FILE as RECIPE_FILE
from prefillshare.finetuning.recipe import Recipe
from prefillshare.finetuning.train import Decoder, lora_config
from prefillshare.finetuning.transcripts import Example

#: peft's name of the adapter that the recipe describes: the prefill module's.
PREFILL = "default"


class Joint(Decoder):
    """`tasks`: token ids of an example -> its task. `adapters`: task -> the recipe of its decoder's adapter. The training
    recipe is of method ordinary: base KV is not given, it is made in each step."""

    def __init__(self, recipe: Recipe, tasks: Mapping[Sequence[int], str], adapters: Mapping[str, Recipe]):
        super().__init__(recipe)
        self._tasks, self._over_base = tasks, METHODS["prefillshare"]
        for name, of in adapters.items():
            self.model.add_adapter(name, lora_config(of, self.model.config.num_hidden_layers))
        self._use(PREFILL)

    def loss_sum(self, examples: Sequence[Example], kv: LayersKV | None) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for task in sorted({self._tasks[e.token_ids] for e in examples}):
            part = [e for e in examples if self._tasks[e.token_ids] == task]
            with self.precision():
                self._use(PREFILL)
                batch = conditioned.make_batch(self._over_base, part, self._prefilled(part), self.device)
                self._use(PREFILL, task)
                total = total + conditioned.loss_sum(self.model, batch)
        return total

    def _prefilled(self, examples: Sequence[Example]) -> LayersKV:
        """As `conditioned.base_kv`, with gradients."""
        contexts = [e.token_ids[: self._over_base.view(e).base_tokens] for e in examples]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for c in contexts], batch_first=True)
        cache = conditioned.plain(self.model).model(ids.to(self.device), use_cache=True).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _use(self, *adapters: str) -> None:
        """Compute with these adapters. All of them stay trainable: peft freezes those that it does not use."""
        self.model.base_model.set_adapter(list(adapters))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)


def prefill_module(joint: Path, recipe: Recipe) -> None:
    """Write what `recipe` names as its output: the model with the prefill module's adapter merged. `joint`: what the training
    has written."""
    output.write_model(Path(recipe.output), recipe, output.merged(Path(recipe.base), joint))
    _describe(joint, recipe)


def decoder(joint: Path, task: str, recipe: Recipe) -> None:
    """Write what `recipe` names as its output: a task's decoder over the prefill module."""
    shutil.copytree(joint / task, Path(recipe.output), dirs_exist_ok=True)
    _describe(joint, recipe)


def _describe(joint: Path, recipe: Recipe) -> None:
    folder = Path(recipe.output)
    shutil.copyfile(joint / output.FIGURES, folder / output.FIGURES)
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    output.contract(recipe).write(folder)
