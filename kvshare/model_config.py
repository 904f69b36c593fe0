"""A model's config.json, as far as it is used here, with the types that it has to have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.errors import ConfigError

FILE = "config.json"
#: More than any model has; engines compute with these numbers.
Size = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Ratio = Annotated[float, Field(gt=0, lt=1e12, allow_inf_nan=False)]


class Rope(BaseModel):
    """`factor`: by which positions are stretched."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    factor: Ratio | None = None


class ModelConfig(BaseModel):
    """Of a plain decoder-only transformer."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_size: Size
    vocab_size: Size
    max_position_embeddings: Size | None = None
    architectures: tuple[str, ...] | None = None
    rope_theta: Ratio | None = None
    partial_rotary_factor: Ratio | None = None
    #: transformers 5 writes the first, earlier ones the second.
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None

    @classmethod
    def read(cls, folder: str | Path) -> ModelConfig:
        """Raises ConfigError for a model that is not a plain decoder-only transformer."""
        return cls.of(fingerprint.read_json(folder, FILE), f"{folder}/{FILE}")

    @classmethod
    def of(cls, data: Mapping[str, Any], file: str) -> ModelConfig:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = error.errors()
        if lacking := [repr(p["loc"][0]) for p in problems if p["type"] == "missing" and len(p["loc"]) == 1]:
            raise ConfigError(f"{file} lacks {', '.join(lacking)}; only decoder-only transformers are served")
        where, what = ".".join(map(str, problems[0]["loc"])), problems[0]["msg"]
        raise ConfigError(f"{file} is not a model's: {where}: {what}", fix="copy the file again")

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def stretch(self) -> float:
        """By which RoPE stretches the positions."""
        return (self.rope_parameters or self.rope_scaling or Rope()).factor or 1.0
