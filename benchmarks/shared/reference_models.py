"""A deployment's models in plain transformers, for tests and benchmarks: what its decoders' responses must be."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from prefillshare import reference
from prefillshare.kvshare import decoders
from prefillshare.kvshare.config import Deployment

#: Largest difference of a log-probability between an engine and plain transformers, both in float32.
TOLERANCE = 1e-3


class ReferenceModels:
    """Each is loaded once, when it is first needed."""

    def __init__(self, deployment: Deployment):
        self.deployment = deployment
        self.served = decoders.served(deployment)
        self._models: dict[str, object] = {}

    @cached_property
    def base(self):
        return load(self.deployment.base.model)

    def decoder(self, name: str):
        if name not in self._models:
            kind = self.served[name]
            pool = next(p for p in self.deployment.decode if p.pool == kind.pool)
            if kind.kind == "full":
                self._models[name] = load(pool.model)
            elif kind.kind == "base":
                self._models[name] = self.base
            else:
                from peft import PeftModel

                self._models[name] = PeftModel.from_pretrained(load(self.deployment.base.model), pool.adapters[name]).eval()
        return self._models[name]

    def says(self, name: str, prompt: list[int], tokens: list[int], own_layers: str = "", pick=reference.chosen) -> list:
        """Of each token of a response, what `pick` takes of the decoder's logits: its log-probability. `own_layers`: as in the
        turn's usage."""
        return reference.of(self.served[name], own_layers)(self.base, self.decoder(name), prompt, tokens, pick=pick)


def load(folder: str | Path):
    """A model in plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
