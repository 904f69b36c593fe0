"""Distillation: a decoder over base KV learns an ordinary fine-tune's distribution of each next token, beside the token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, kl_div

from prefillshare.finetuning import conditioned, subjects
from prefillshare.finetuning.conditioned import LayersKV
from prefillshare.finetuning.methods import METHODS
from prefillshare.finetuning.recipe import Recipe
from prefillshare.finetuning.train import Decoder
from prefillshare.finetuning.transcripts import Example

TEACHERS = METHODS["ordinary"]


class Distilled(Decoder):
    """The loss is the mean of the negative log-likelihood and the divergence of the decoder from the teacher. `teacher`: folder
    of an ordinary fine-tune of the recipe's base."""

    def __init__(self, recipe: Recipe, teacher: Path):
        super().__init__(recipe)
        self._teacher = subjects.load("teacher", Path(recipe.base), teacher, TEACHERS, dtype=self.dtype).decoder.to(self.device)

    def loss_sum(self, examples: Sequence[Example], kv: LayersKV | None) -> torch.Tensor:
        batch = conditioned.make_batch(self.method, examples, kv, self.device)
        with self.precision():
            logits = conditioned.response_logits(self.model, batch)
        likelihood = cross_entropy(logits, batch.labels[batch.labels != -100], reduction="sum")
        divergence = kl_div(logits.log_softmax(-1), self._taught(examples), reduction="sum", log_target=True)
        return (likelihood + divergence) / 2

    @torch.no_grad()
    def _taught(self, examples: Sequence[Example]) -> torch.Tensor:
        """The teacher's log-probabilities, [response tokens, vocabulary]."""
        batch = conditioned.make_batch(TEACHERS, examples, None, self.device)
        with self.precision():
            return conditioned.response_logits(self._teacher, batch).log_softmax(-1)
