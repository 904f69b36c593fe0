"""A training recipe: one YAML file that says what a decoder is made of and how. Unknown keys are refused.

    base: models/smollm2-135m-instruct
    method: prefillshare
    train: data/tools.jsonl
    output: adapters/tools
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from prefillshare.finetuning.methods import METHODS
from prefillshare.kvshare.config.errors import as_config_error
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.yaml_tree import Node, read

DTYPES = ("float32", "bfloat16")


def device_of(wanted: str) -> str:
    """auto: a GPU if there is one. Raises ConfigError for a GPU that is not there."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in ("cpu", "cuda") or (wanted == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"no device {wanted!r} here", field="device", fix="use auto")
    return wanted


class Lora(Node):
    """A LoRA adapter on all linear modules that the method uses."""

    rank: int = Field(16, ge=1, le=512)
    """Rank of the update."""
    alpha: float = Field(32, gt=0)
    """Scale: the update counts alpha / rank times."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the update's inputs dropped while training."""
    last_layers: int | None = Field(None, ge=1)
    """Adapt only so many of the model's last layers; unset: all. The others' KV stays the base's: of an `ordinary` fine-tune
    DroidSpeak then has to compute these layers only, and is exact. Costs the decoder some of what it could learn."""
    saved_as: Literal["float32", "bfloat16"] = "float32"
    """Type in the adapter's files. bfloat16: half the size, rounded."""


class Recipe(Node):
    """Relative paths are the current folder's."""

    base: str
    """Folder of the base model in Hugging Face format. It stays as it is."""
    method: Literal["prefillshare", "icarus", "ordinary"] = "prefillshare"
    """prefillshare: over base KV of the prompt. icarus: over base KV of everything. ordinary: what fine-tuning is elsewhere,
    served in mode none."""
    weights: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter, or all weights (not with icarus)."""
    lora: Lora = Lora()
    """Unused with weights: full."""
    train: str
    """JSONL of transcripts: {"messages": [...]} or {"prompt": ..., "response": ...} on each line."""
    validation: str | None = None
    """JSONL whose loss is measured after every epoch."""
    output: str
    """Folder for the decoder. Checkpoints stand in it until it is done."""
    max_tokens: int = Field(1024, ge=16)
    """Longest transcript; of a longer one the responses that fit are learnt."""
    epochs: int = Field(1, ge=1)
    """Times every transcript is seen."""
    batch_size: int = Field(16, ge=1)
    """Transcripts per optimizer step."""
    micro_batch_size: int = Field(4, ge=1)
    """Transcripts per forward pass; gradients are accumulated over a step's."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak rate. It rises linearly over `warmup` and falls as a cosine to a tenth."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are cut to this."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the base and its KV in training: choose what you serve. With bfloat16 what is trained stays float32; a decoder
    that is then served in float32 sees KV that differs by rounding from what it was trained on."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, about a third slower."""
    base_kv_gib: float = Field(8.0, ge=0)
    """Disk for the prompts' base KV, GiB; 0: compute it anew in every epoch. Given back at the end."""
    checkpoint_every_steps: int = Field(50, ge=1)
    """A run that was ended goes on from its last checkpoint."""
    seed: int = Field(0, ge=0)
    """Decides the order of the data, the adapter's beginnings and dropout."""

    @model_validator(mode="after")
    def _icarus_is_lora(self):
        if self.weights == "full" and not self.how.own_kv:
            raise ValueError(f"{self.method} trains adapters: the base's own weights make all KV; set weights: lora")
        return self

    @property
    def how(self):
        return METHODS[self.method]


def parse(data: Any) -> Recipe:
    if not isinstance(data, dict):
        raise ConfigError(f"a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}", fix="see docs/training.md")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise as_config_error(error, Recipe) from None
    if not (Path(recipe.base) / "config.json").is_file():
        raise ConfigError(f"no model in {recipe.base}", field="base", fix="give a folder in Hugging Face format")
    return recipe


def load(path: Path) -> Recipe:
    """Read and check a recipe. Raises ConfigError naming the field."""
    return parse(read(path, "recipe", fix="finetuning/recipes/ holds examples"))
