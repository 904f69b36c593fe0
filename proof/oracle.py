"""What responses must be, from plain transformers on the device at hand (prefillshare/reference.py)."""

from __future__ import annotations

import torch

from prefillshare import reference
from prefillshare.proof.asked import Machine
from prefillshare.proof.engines import Taken
from prefillshare.proof.subject import Subject


class Oracle:
    """The subject's models in one dtype."""

    def __init__(self, subject: Subject, dtype: str = "float32"):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._subject, self._dtype, self._device = subject, getattr(torch, dtype), Machine.here().device
        self._load = lambda: AutoModelForCausalLM.from_pretrained(subject.base, dtype=self._dtype).eval().to(self._device)
        self._base = self._load()
        self._decoders: dict[str | None, object] = {None: self._base}

    def says(self, taken: Taken, adapter: str | None, *, alone: bool = False) -> list[float]:
        """Log-probability of each token of a response. `alone`: if the decoder had computed everything itself."""
        group = () if alone or self._subject.group is None else (str(self._subject.group),)
        function = reference.none if alone else getattr(reference, self._subject.mode.name)
        with torch.device(self._device):
            return function(self._base, self._decoder(adapter), taken.prompt, taken.tokens, *group, pick=_chosen)

    def _decoder(self, adapter: str | None):
        if adapter not in self._decoders:
            from peft import PeftModel

            self._decoders[adapter] = PeftModel.from_pretrained(self._load(), self._subject.adapters[adapter]).eval()
        return self._decoders[adapter]


def _chosen(logits: torch.Tensor, response: list[int]) -> list[float]:
    """As engines do it: in float32, whatever the model's dtype."""
    return reference.chosen(logits.float(), response)
