"""The decoders of a deployment: which name is served where, and whether its files may be served at all."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from kvshare import fingerprint
from kvshare.config import DecodePool, Deployment
from kvshare.contract import DecoderContract, KVShape
from kvshare.errors import ConfigError, ContractMismatch
from kvshare.modes import get_mode


@dataclass(frozen=True)
class Decoder:
    """A served name. `adapter`: LoRA to ask the engine for; None: the engine's own weights."""

    name: str
    pool: str
    sharing: str
    adapter: str | None
    #: "base", "lora" or "full".
    kind: str


def served(deployment: Deployment) -> dict[str, Decoder]:
    """Every served name, the base first if a pool serves it."""
    decoders: dict[str, Decoder] = {}
    for pool in deployment.decode:
        if pool.model:
            name = pool.name or pool.pool
            decoders[name] = Decoder(name, pool.pool, pool.sharing, None, "full")
            continue
        if pool.serve_base and deployment.base.name not in decoders:
            base = Decoder(deployment.base.name, pool.pool, pool.sharing, None, "base")
            decoders = {base.name: base, **decoders}
        for name in pool.adapters:
            decoders[name] = Decoder(name, pool.pool, pool.sharing, name, "lora")
    return decoders


def check_files(deployment: Deployment) -> DecoderContract:
    """Check every decoder's files against the base (R4). Returns the base's own contract.

    Raises ConfigError for files that cannot be served, ContractMismatch for a decoder of another base.
    """
    base = DecoderContract.of_base(deployment.base.model)
    _check_lengths(deployment, base.shape)
    for number, pool in enumerate(deployment.decode):
        if pool.model:
            _check_full(pool, base, f"decode.{number}.model")
        for name, folder in pool.adapters.items():
            _check_adapter(pool, folder, base, f"decode.{number}.adapters.{name}")
    return base


def _check_lengths(deployment: Deployment, shape: KVShape) -> None:
    limit = fingerprint.read_json(deployment.base.model, "config.json").get("max_position_embeddings")
    if limit and deployment.base.max_model_len > limit:
        raise ConfigError(
            f"{deployment.base.max_model_len} is more than the {limit} positions of {deployment.base.model}",
            field="base.max_model_len", fix=f"use at most {limit}",
        )
    blocks = -(-deployment.base.max_model_len // deployment.base.block_size) + 1
    need_gib = blocks * deployment.base.block_size * shape.bytes_per_token(deployment.base.dtype) / 2**30
    fields = [(f"decode.{n}", pool) for n, pool in enumerate(deployment.decode)]
    fields += [(f"decode.{n}.prefill", pool.prefill) for n, pool in enumerate(deployment.decode) if pool.prefill]
    if deployment.shares_prefill:
        fields.append(("prefill", deployment.prefill))
    for field, engines in fields:
        have_gib = engines.kv_cache_gib * engines.tensor_parallel_size
        if have_gib < need_gib:
            raise ConfigError(
                f"{engines.kv_cache_gib:g} GiB do not hold one sequence of {deployment.base.max_model_len} tokens",
                field=f"{field}.kv_cache_gib",
                fix=f"use at least {need_gib / engines.tensor_parallel_size:.4f}, or lower base.max_model_len",
            )


def _check_full(pool: DecodePool, base: DecoderContract, field: str) -> None:
    folder = pool.model
    if get_mode(pool.sharing).shares_prefill:
        DecoderContract.read(folder, field).check(base, folder, field)
    shape = KVShape.of(folder)
    if get_mode(pool.sharing).shares_prefill and shape != base.shape:
        raise ContractMismatch(f"{folder} has KV of {shape}, the base has {base.shape}", field=field)
    # Sessions are token ids: whoever takes part must read them alike, whatever KV it uses.
    if (mine := fingerprint.tokenizer(folder)) != base.base.tokenizer:
        raise ContractMismatch(
            f"{folder} has tokenizer {mine}, the base has {base.base.tokenizer}", field=field,
            fix="serve a fine-tune that kept the base's tokenizer",
        )
    fingerprint.weights(folder)


def _check_adapter(pool: DecodePool, folder: str, base: DecoderContract, field: str) -> None:
    try:
        config = fingerprint.read_json(folder, "adapter_config.json")
    except ConfigError as error:
        raise ConfigError(error.message, field=field, fix="give a LoRA adapter saved by PEFT") from None
    if config.get("peft_type", "LORA") != "LORA":
        raise ConfigError(f"{folder} is a {config['peft_type']} adapter; only LORA is served", field=field)
    rank = config.get("r", 0)
    if rank > pool.max_lora_rank:
        raise ConfigError(
            f"{folder} has rank {rank}, pool {pool.pool!r} makes room for {pool.max_lora_rank}",
            field=field, fix=f"set max_lora_rank of the pool to at least {rank}",
        )
    weights = Path(folder) / "adapter_model.safetensors"
    if not weights.is_file():
        raise ConfigError(f"{folder} has no adapter_model.safetensors", field=field, fix="save the adapter in safetensors format")
    try:
        with weights.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            json.loads(source.read(length))
    except (ValueError, struct.error) as error:
        raise ConfigError(f"{weights} is not a safetensors file: {error}", field=field) from None
    if get_mode(pool.sharing).shares_prefill:
        DecoderContract.read(folder, field).check(base, folder, field)
