"""The oracle for a running system: takes turns through the gRPC client and compares every log-probability."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from prefillshare import reference
from prefillshare.client import RemoteSession, TurnResult
from prefillshare.kvshare import decoders
from prefillshare.kvshare.config import Deployment

TOLERANCE = 1e-3


class Oracle:
    """A deployment's models in plain transformers, each loaded once."""

    def __init__(self, deployment: Deployment):
        self.deployment = deployment
        self.served = decoders.served(deployment)
        self._models: dict[str, object] = {}

    @cached_property
    def base(self):
        return load(self.deployment.base.model)

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.deployment.base.model)

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

    def diff(
        self,
        name: str,
        prompt: list[int],
        tokens: list[int],
        logprobs: list[float],
        mode: str | None = None,
        own_layers: str = "",
    ) -> float:
        """Largest difference from the reference of `mode` (default: the decoder's). `own_layers`: as in the turn's usage."""
        function = getattr(reference, mode) if mode else reference.of(self.served[name], own_layers)
        return reference.max_abs_diff(logprobs, function(self.base, self.decoder(name), prompt, tokens))

    def turn(
        self, session: RemoteSession, name: str, *, suffix_ids: list[int] | None = None, **kwargs
    ) -> tuple[TurnResult, list[int]]:
        """Take a turn and check it. Returns the result and the prompt the decoder saw."""
        if suffix_ids:
            kwargs["suffix_token_ids"] = suffix_ids
        result = session.turn(name, logprobs=0, **kwargs)
        kept = list(session.get(with_token_ids=True).token_ids)
        prompt = kept[: len(kept) - len(result.token_ids)] + (suffix_ids or [])
        assert kept[len(kept) - len(result.token_ids) :] == result.token_ids
        assert result.usage.prompt_tokens == len(prompt)
        own_layers = result.usage.own_layers
        assert self.diff(name, prompt, result.token_ids, result.logprobs, own_layers=own_layers) <= TOLERANCE
        return result, prompt


def load(folder: str | Path):
    """A model in plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
