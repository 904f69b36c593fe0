"""What responses must be, from plain transformers (prefillshare/reference.py)."""

from __future__ import annotations

import torch

from prefillshare import reference
from prefillshare.proof.asked import Machine
from prefillshare.proof.engines import Taken
from prefillshare.proof.subject import Subject


class Oracle:
    """The subject's models in one dtype. `device`: where they are."""

    def __init__(self, subject: Subject, dtype: str = "float32"):
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._subject, self._dtype = subject, getattr(torch, dtype)
        self.device = device(Machine.here(), 2 * subject.weight_bytes(dtype))
        self._base, self._adapted = self._load(), None

    def _load(self):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self._subject.base, dtype=self._dtype).eval().to(self.device)

    def says(self, taken: Taken, adapter: str | None, *, alone: bool = False) -> list[float]:
        """Log-probability of each token of a response. `alone`: if the decoder had computed everything itself."""
        group = () if alone or self._subject.group is None else (str(self._subject.group),)
        function = reference.none if alone else getattr(reference, self._subject.mode.name)
        own = {} if alone or taken.own_tokens == 1 else {"own_tokens": taken.own_tokens}
        decoder = self._decoder(adapter)
        with torch.device(self.device):
            return function(self._base, decoder, taken.prompt, taken.tokens, *group, **own, pick=_chosen)

    def _decoder(self, adapter: str | None):
        """The base, or its one copy that has all adapters, with this one switched on."""
        if adapter is None:
            return self._base
        if self._adapted is None:
            from peft import PeftModel

            names = iter(self._subject.adapters.items())
            first, path = next(names)
            self._adapted = PeftModel.from_pretrained(self._load(), path, adapter_name=first)
            for name, path in names:
                self._adapted.load_adapter(path, adapter_name=name)
        self._adapted.set_adapter(adapter)
        return self._adapted.eval()


def device(machine: Machine, weight_bytes: int) -> str:
    """The GPU, if engines have left enough of it for these weights."""
    if machine.is_gpu and torch.cuda.mem_get_info()[0] < 1.3 * weight_bytes:
        return "cpu"
    return machine.device


def _chosen(logits: torch.Tensor, response: list[int]) -> list[float]:
    """As engines do it: in float32, whatever the model's dtype."""
    return reference.chosen(logits.float(), response)
