"""The state of a run, so that one that was ended goes on as if it had not been."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from prefillshare.finetuning.recipe import MAY_CHANGE, Recipe
from prefillshare.finetuning.transcripts import Example
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import ConfigError

FILE = "checkpoint.pt"


class Checkpoint:
    """Trained weights, optimizer, random numbers and the step, in one file of the run's folder."""

    def __init__(
        self, folder: Path, recipe: Recipe, contract: DecoderContract, examples: Sequence[Example], decoder, optimizer
    ):
        self._file, self._decoder, self._optimizer = folder / FILE, decoder, optimizer
        settings = recipe.model_dump(mode="json", exclude=MAY_CHANGE)
        data = hashlib.sha256(repr([(e.token_ids, e.responses) for e in examples]).encode()).hexdigest()
        self._run = {**settings, "base's weights": contract.base.weights, "data": data}

    def save(self, step: int, seconds: float, kv_tokens: tuple[int, int]) -> None:
        """`seconds`, `kv_tokens`: what the run has taken so far; the tokens whose base KV was read, and was computed."""
        part = self._file.with_suffix(f".{os.getpid()}.part")
        state = {
            "step": step,
            "seconds": seconds,
            "kv_tokens": kv_tokens,
            "run": self._run,
            "weights": {name: parameter.detach() for name, parameter in self._decoder.trainable().items()},
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(state, part)
        part.replace(self._file)

    def load(self) -> tuple[int, float, tuple[int, int]]:
        """Restore the checkpoint. Returns (steps done, seconds, tokens whose base KV was read and computed), all zero if there
        is none. Raises ConfigError if the checkpoint is another run's."""
        if not self._file.is_file():
            return 0, 0.0, (0, 0)
        state = torch.load(self._file, map_location="cpu", weights_only=True)
        for key, value in self._run.items():
            if state["run"].get(key) != value:
                raise ConfigError(
                    f"{self._file} is of a run whose {key} was {state['run'].get(key)!r}, now it is {value!r}",
                    field="output",
                    fix="choose another output, or remove the folder to begin anew",
                )
        parameters = self._decoder.trainable()
        with torch.no_grad():
            for name, value in state["weights"].items():
                parameters[name].copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["cuda_random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_random"])
        return state["step"], state["seconds"], tuple(state["kv_tokens"])
