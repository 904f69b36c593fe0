"""The KV contract (R4): what base and decoder, prefill and decode engine must agree on before a byte of KV moves.

    KVShape        layers, KV heads, head size, RoPE, vocabulary: what the bytes are
    BaseIdentity   fingerprints of the base's weights, config, tokenizer and chat template: whose KV it is
    DecoderContract  `kv_contract.json` beside a decoder's weights: the identity and shape it was made for
    KVContract     identity, shape and how this deployment stores KV; its digest goes with every handshake and handoff
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.errors import ConfigError, ContractMismatch

FILE = "kv_contract.json"
VERSION = 1
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
        return cls.of_config(fingerprint.read_json(folder, "config.json"), f"{folder}/config.json")

    @classmethod
    def of_config(cls, c: Mapping[str, Any], file: str) -> KVShape:
        try:
            heads = c["num_attention_heads"]
            return cls(
                layers=c["num_hidden_layers"],
                kv_heads=c.get("num_key_value_heads") or heads,
                head_size=c.get("head_dim") or c["hidden_size"] // heads,
                rope=json.dumps(fingerprint.rope(c), sort_keys=True),
                vocab_size=c["vocab_size"],
            )
        except KeyError as error:
            raise ConfigError(f"{file} lacks {error}; only decoder-only transformers are served") from None
        except (TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"{file} is not a model's: {error}") from None

    def bytes_per_token(self, dtype: str) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class BaseIdentity:
    weights: str
    config: str
    tokenizer: str
    chat_template: str

    @classmethod
    def of(cls, folder: str | Path) -> BaseIdentity:
        return cls(
            weights=fingerprint.weights(folder),
            config=fingerprint.config(folder),
            tokenizer=fingerprint.tokenizer(folder),
            chat_template=fingerprint.chat_template(folder),
        )


@dataclass(frozen=True)
class DecoderContract:
    """What a decoder was trained against. `trained_with`: how it was made, for human readers only."""

    base: BaseIdentity
    shape: KVShape
    trained_with: str = ""

    @classmethod
    def of_base(cls, folder: str | Path, trained_with: str = "") -> DecoderContract:
        return cls(BaseIdentity.of(folder), KVShape.of(folder), trained_with)

    def write(self, decoder: str | Path) -> Path:
        path = Path(decoder) / FILE
        path.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n")
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
            return cls(BaseIdentity(**data["base"]), KVShape(**data["shape"]), data.get("trained_with", ""))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{decoder}/{FILE} is not a KV contract: {error}", field=field, fix=again) from None

    def check(self, base: DecoderContract, decoder: str, field: str | None = None) -> None:
        """Raises ContractMismatch naming the first thing on which this decoder and the base served disagree."""
        for part in ("base", "shape"):
            mine, theirs = asdict(getattr(self, part)), asdict(getattr(base, part))
            for key in mine:
                if mine[key] != theirs[key]:
                    raise ContractMismatch(
                        f"{decoder} was trained against a base whose {key} is {mine[key]}, the base served has {theirs[key]}",
                        field=field,
                        fix="serve it with the base it was trained against, or train it against this one",
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
