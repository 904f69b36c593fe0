"""The KV contract (R4): what base and decoder, prefill and decode engine must agree on before a byte of KV moves.

    KVShape        layers, KV heads, head size, RoPE, vocabulary: what the bytes are
    BaseIdentity   fingerprints of the base's weights, config, tokenizer and chat template: whose KV it is
    DecoderContract  `kv_contract.json` beside a decoder's weights: the identity and shape it was made for
    KVContract     identity, shape and how this deployment stores KV; its digest goes with every handshake and handoff
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prefillshare.kvshare import fingerprint, model_config
from prefillshare.kvshare.errors import ConfigError, ContractMismatch
from prefillshare.kvshare.model_config import ModelConfig

FILE = "kv_contract.json"
VERSION = 1
_BASE_FIX = "serve it with the base it was trained against, or train it against this one"
_TEMPLATE_FIX = (
    "set base.chat_template to the template it was trained with, or leave it out for the base's own. Or vouch that this "
    "template lays out what it was trained on: prefillshare contract write DECODER --base BASE_FOLDER --chat-template TEMPLATE"
)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KVShape:
    layers: int
    kv_heads: int
    head_size: int
    rope: str
    vocab_size: int

    @classmethod
    def of(cls, folder: str | Path) -> KVShape:
        """Read from config.json. Raises ConfigError for a model that is not a plain decoder-only transformer."""
        return cls.of_config(fingerprint.read_json(folder, model_config.FILE), f"{folder}/{model_config.FILE}")

    @classmethod
    def of_config(cls, data: Mapping[str, Any], file: str) -> KVShape:
        config, rope = ModelConfig.of(data, file), json.dumps(fingerprint.rope(data), sort_keys=True)
        return cls(config.num_hidden_layers, config.kv_heads, config.head_size, rope, config.vocab_size)

    def bytes_per_token(self, dtype: str) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class BaseIdentity:
    weights: str
    config: str
    tokenizer: str
    chat_template: str

    @classmethod
    def of(cls, folder: str | Path, template: str | None = None) -> BaseIdentity:
        """`template`: text of the chat template that is used instead of the folder's."""
        return cls(
            weights=fingerprint.weights(folder),
            config=fingerprint.config(folder),
            tokenizer=fingerprint.tokenizer(folder),
            chat_template=fingerprint.chat_template(folder) if template is None else fingerprint.of_text(template),
        )


@dataclass(frozen=True)
class DecoderContract:
    """What a decoder was trained against. `trained_with`: how it was made, for human readers only. `own_tokens`: how many of a
    prompt's last tokens it was trained to compute itself (mode prefillshare). `other_templates`: fingerprints of further chat
    templates for which somebody vouches that they lay out what the decoder was trained on; they say nothing of how it was made,
    so that contracts with and without them are equal."""

    base: BaseIdentity
    shape: KVShape
    trained_with: str = ""
    own_tokens: int = 1
    other_templates: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of_base(
        cls, folder: str | Path, trained_with: str = "", template: str | None = None, own_tokens: int = 1
    ) -> DecoderContract:
        """`template`: as for BaseIdentity.of."""
        shape = KVShape.of(folder)  # it looks at config.json more closely
        return cls(BaseIdentity.of(folder, template), shape, trained_with, own_tokens)

    def with_template(self, base: DecoderContract, decoder: str) -> DecoderContract:
        """This contract, vouched for under the chat template of `base`, too. Raises ContractMismatch if more than that
        differs."""
        templates = dict.fromkeys((self.base.chat_template, *self.other_templates, base.base.chat_template))
        vouched = replace(self, other_templates=tuple(templates)[1:])
        vouched.check(base, decoder)
        return vouched

    def write(self, decoder: str | Path) -> Path:
        path, data = Path(decoder) / FILE, {"version": VERSION, **asdict(self)}
        if not self.other_templates:
            del data["other_templates"]
        if self.own_tokens == 1:  # as contracts of earlier releases
            del data["own_tokens"]
        path.write_text(json.dumps(data, indent=2) + "\n")
        return path

    @classmethod
    def read(cls, decoder: str | Path, field: str | None = None) -> DecoderContract:
        if not (Path(decoder) / FILE).is_file():
            raise ConfigError(
                f"{decoder} has no {FILE}, so nothing says which base it was trained against",
                field=field,
                fix=f"train it with prefillshare, or vouch for it: prefillshare contract write {decoder} --base BASE_FOLDER",
            )
        again = f"write it again: prefillshare contract write {decoder} --base BASE_FOLDER"
        try:
            data = fingerprint.read_json(decoder, FILE)
        except ConfigError as error:
            raise ConfigError(error.message, field=field, fix=again) from None
        if data.get("version") != VERSION:
            raise ConfigError(
                f"{decoder}/{FILE} has version {data.get('version')!r}, this release reads {VERSION}", field=field, fix=again
            )
        try:
            others, own_tokens = tuple(data.get("other_templates", ())), data.get("own_tokens", 1)
            if type(own_tokens) is not int or own_tokens < 1:
                raise TypeError(f"own_tokens is {own_tokens!r}, not a number of tokens")
            base, shape = BaseIdentity(**data["base"]), KVShape(**data["shape"])
            return cls(base, shape, data.get("trained_with", ""), own_tokens, others)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{decoder}/{FILE} is not a KV contract: {error}", field=field, fix=again) from None

    def check(self, base: DecoderContract, decoder: str, field: str | None = None) -> None:
        """Raises ContractMismatch naming the first thing on which this decoder and the base served disagree."""
        for part in ("base", "shape"):
            mine, theirs = asdict(getattr(self, part)), asdict(getattr(base, part))
            for key in mine:
                if mine[key] == theirs[key] or (key == "chat_template" and theirs[key] in self.other_templates):
                    continue
                raise ContractMismatch(
                    f"{decoder} was trained against a base whose {key} is {mine[key]}, the base served has {theirs[key]}",
                    field=field,
                    fix=_TEMPLATE_FIX if key == "chat_template" else _BASE_FIX,
                )


@dataclass(frozen=True)
class KVContract:
    """Identity and shape of the base, and how one deployment stores KV."""

    base: BaseIdentity
    shape: KVShape
    dtype: str
    block_size: int
    engine: str
    #: How KV moves between engines.
    transport: str = "nixl"
    #: Layers whose inputs prefill engines keep beside the KV.
    ecache_layers: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """The digest that engines compare. Short enough for a log line, long enough not to collide."""
        return fingerprint.of_json({"version": VERSION, **asdict(self)})[:32]
