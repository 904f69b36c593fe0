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

from prefillshare.finetuning.methods import Method, method_of
from prefillshare.kvshare import chat_template, given_files
from prefillshare.kvshare.config.errors import as_config_error
from prefillshare.kvshare.contract import FILE as CONTRACT_FILE
from prefillshare.kvshare.contract import KVShape
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.modes import get_mode
from prefillshare.kvshare.yaml_tree import FieldError, Node, read

#: Keys of a recipe that change a run's speed and memory, but not what it learns (except for rounding).
MAY_CHANGE = {"device", "micro_batch_size", "gradient_checkpointing", "base_kv_gib", "checkpoint_every_steps"}
#: In the folder that a run has written: its recipe.
FILE = "recipe.yaml"


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
    """Share of the update's inputs that is dropped while training."""
    last_layers: int | None = Field(None, ge=1)
    """Adapt only this many of the model's last layers; unset: all. The other layers' KV stays the base's. For an `ordinary`
    fine-tune, DroidSpeak then has to compute only the adapted layers, and is exact. The decoder can learn somewhat less this
    way."""
    saved_as: Literal["float32", "bfloat16"] = "float32"
    """Type of the numbers in the adapter's files. bfloat16: half the size, rounded."""


class Recipe(Node):
    """Relative paths are the current folder's."""

    base: str
    """Folder of the base model in Hugging Face format. It is not changed."""
    chat_template: str | None = Field(None, min_length=1)
    """Template that lays out conversations instead of the base's own, named as base.chat_template in a deployment file. The
    decoder's contract names it: serve it with the same one."""
    method: Literal["prefillshare", "icarus", "ordinary", "base"] = "prefillshare"
    """What is trained, over which KV. prefillshare: a decoder, over base KV of the prompt. icarus: a decoder, over base KV of
    everything. ordinary: a decoder over its own KV, as in ordinary fine-tuning; served in mode none. base: a new base, trained
    like ordinary; `base` of other recipes and of deployments may name its folder."""
    own_tokens: int = Field(1, ge=1)
    """Method prefillshare: how many of a prompt's last tokens the decoder computes itself, in training and when it is served.
    1: only the last one. More helps with a task that the base has not learnt, if the last message is among them."""
    weights: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter, or all weights (not with icarus). A new base is a whole model either way: an adapter is merged, and
    kept beside it, in the folder's adapter/."""
    lora: Lora = Lora()
    """The LoRA adapter (keys below); unused with weights: full."""
    train: str
    """JSONL of transcripts: {"messages": [...]} or {"prompt": ..., "response": ...} on each line."""
    validation: str | None = None
    """JSONL of transcripts on which the loss is measured after every epoch."""
    output: str
    """Folder for the decoder, or for the new base. It holds the checkpoints until training is done."""
    max_tokens: int = Field(1024, ge=16)
    """Most tokens of a transcript. Of a longer transcript, the responses that fit are learnt."""
    epochs: int = Field(1, ge=1)
    """How many times every transcript is seen."""
    batch_size: int = Field(16, ge=1)
    """Transcripts per optimizer step."""
    micro_batch_size: int = Field(4, ge=1)
    """Transcripts per forward pass; gradients are accumulated over the forward passes of a step."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak rate. It rises linearly over `warmup` and falls as a cosine to a tenth."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps during which the rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are scaled down to this norm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the base and its KV in training: choose the one that you serve. With bfloat16 the trained weights stay float32;
    if the decoder is then served in float32, it sees KV that differs by rounding from what it was trained on."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one, else the CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them: takes less memory, and is about a third slower."""
    base_kv_gib: float = Field(8.0, ge=0)
    """Disk space for the prompts' base KV, GiB; 0: the KV is computed anew in every epoch. The space is freed at the end."""
    checkpoint_every_steps: int = Field(50, ge=1)
    """Steps between two checkpoints. A run that was interrupted goes on from its last checkpoint."""
    seed: int = Field(0, ge=0)
    """Determines the order of the data, the adapter's initial weights and dropout."""

    @model_validator(mode="after")
    def _icarus_is_lora(self):
        if self.weights == "full" and not self.how.own_kv:
            raise FieldError("weights", f"{self.method} trains adapters: the base's own weights make all KV; use lora")
        return self

    @model_validator(mode="after")
    def _own_end_is_prefillshares(self):
        if self.own_tokens > 1 and not get_mode(self.how.sharing).own_end:
            raise FieldError("own_tokens", f"with method {self.method} the boundary is fixed; leave it out")
        return self

    @property
    def makes_base(self) -> bool:
        return self.method == "base"

    @property
    def how(self) -> Method:
        return method_of(self.method, self.own_tokens)

    @property
    def template_text(self) -> str | None:
        return chat_template.text_of_given(self.chat_template, "chat_template")


def parse(data: Any) -> Recipe:
    if not isinstance(data, dict):
        raise ConfigError(f"a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}", fix="see docs/training.md")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise as_config_error(error, Recipe) from None
    recipe.template_text  # noqa: B018 - raises ConfigError
    return recipe


def check_files(recipe: Recipe) -> None:
    """Raises ConfigError for what the recipe names and a run could not use. It makes the folder above the output."""
    given_files.model(Path(recipe.base), "base")
    given_files.lines(Path(recipe.train), "train")
    if recipe.validation:
        given_files.lines(Path(recipe.validation), "validation")
    layers = KVShape.of(recipe.base).layers
    if (last := recipe.lora.last_layers) and last > layers:
        raise ConfigError(f"{last} layers, the model has {layers}", field="lora.last_layers", fix="leave it out for all")
    device_of(recipe.device)
    given_files.made_folder(Path(recipe.output), "output")


def is_whole(folder: Path) -> bool:
    """Whether a run has ended that wrote the folder."""
    return (folder / CONTRACT_FILE).is_file()


def load(path: Path) -> Recipe:
    """Read and check a recipe. Raises ConfigError naming the field."""
    return parse(read(path, "recipe", fix="finetuning/recipes/ holds examples"))
