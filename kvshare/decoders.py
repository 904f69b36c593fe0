"""The decoders of a deployment: which name is served by which pool, and whether its files may be served at all."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, get_args

from prefillshare.kvshare import adapter_files, chat_template, fingerprint
from prefillshare.kvshare.adapter_settings import AdapterSettings
from prefillshare.kvshare.config import DecodePool, Deployment, Engines
from prefillshare.kvshare.contract import DecoderContract, KVShape
from prefillshare.kvshare.errors import ConfigError, ContractMismatch, InvalidInput, about
from prefillshare.kvshare.layer_group import LayerGroup, ecache_parts, layer_group
from prefillshare.kvshare.model_config import ModelConfig
from prefillshare.kvshare.modes import get_mode

#: vLLM's default (vllm/config/model.py: max_logprobs), and its number for the whole vocabulary.
VLLM_MAX_LOGPROBS, ALL = 20, -1


@dataclass(frozen=True)
class Decoder:
    """A served name. `adapter`: LoRA to ask the engine for; None: the engine's own weights."""

    name: str
    pool: str
    sharing: str
    adapter: str | None
    #: "base", "lora" or "full".
    kind: str
    #: Groups of layers that it may compute itself over a prompt, largest first; None: no layers.
    own_layers: tuple[LayerGroup | None, ...] = (None,)
    #: Objective for the seconds to the first token: a turn takes the largest group expected to meet it; None: the largest.
    ttft_objective_s: float | None = None
    #: Divergence from its own prefill that is good enough; None: not configured.
    quality_floor: float | None = None
    #: For how many of the likeliest tokens its engines return log-probabilities, at most; or ALL.
    max_logprobs: int = VLLM_MAX_LOGPROBS
    #: As DecodePool.prefill_policy.
    local_prefill: str | None = None
    inter_token_objective_s: float | None = None
    #: Most tokens that one of its engines computes in a step; None: vLLM's default.
    step_tokens: int | None = None
    #: How many of a prompt's last tokens it computes itself.
    own_tokens: int = 1

    def check_logprobs(self, asked: int | None) -> None:
        """`asked`: for how many of the likeliest tokens log-probabilities are asked, or ALL; None: for none. Raises
        InvalidInput if the engines do not return so many."""
        if asked is None or self.max_logprobs == ALL or 0 <= asked <= self.max_logprobs:
            return
        many = "the whole vocabulary" if asked == ALL else asked
        raise InvalidInput(
            f"{many} is more than the {self.max_logprobs} likeliest tokens that {self.name!r} tells log-probabilities of",
            field="logprobs",
            fix=f"ask for at most {self.max_logprobs}, or raise max_logprobs in the engine_args of pool {self.pool!r}",
        )


def served(deployment: Deployment, but: Collection[str] = ()) -> dict[str, Decoder]:
    """Every served name, the base first if a pool serves it. `but`: adapters that engines could not load."""
    decoders: dict[str, Decoder] = {}
    for pool in deployment.decode:
        limit = pool.engine_args.get("max_logprobs", VLLM_MAX_LOGPROBS)
        of_all = {
            "max_logprobs": limit,
            "local_prefill": pool.prefill_policy,
            "inter_token_objective_s": pool.inter_token_objective_s,
            "step_tokens": pool.max_num_batched_tokens,
        }
        promised = {"ttft_objective_s": pool.ttft_objective_s, "quality_floor": pool.quality_floor, **of_all}
        if pool.model:
            name = pool.name or pool.pool
            decoders[name] = Decoder(name, pool.pool, pool.sharing, None, "full", **_own(pool, name), **promised)
            continue
        if pool.serve_base and deployment.base.name not in decoders:
            base = Decoder(deployment.base.name, pool.pool, pool.sharing, None, "base", **of_all)
            decoders = {base.name: base, **decoders}
        for name in (name for name in pool.adapters if name not in but):
            decoders[name] = Decoder(name, pool.pool, pool.sharing, name, "lora", **_own(pool, name), **promised)
    return decoders


def _own(pool: DecodePool, name: str) -> dict[str, Any]:
    """What of a prompt the decoder computes itself."""
    return {"own_layers": _own_layers(pool, name), "own_tokens": pool.own_tokens.get(name, 1)}


def _own_layers(pool: DecodePool, name: str) -> tuple[LayerGroup | None, ...]:
    return tuple(map(layer_group, pool.own_layers.get(name, ("none",))))


def ecache_layers(pools: Iterable[DecodePool]) -> tuple[int, ...]:
    """Layers whose inputs the prefill pool keeps for these pools' decoders."""
    groups = {group for pool in pools for name in pool.own_layers for group in _own_layers(pool, name) if group}
    return tuple(sorted({group.transition for group in groups if group.transition}))


def check_files(deployment: Deployment) -> DecoderContract:
    """Check every decoder's files against the base (R4). Returns the base's own contract.

    Raises ConfigError for files that cannot be served, ContractMismatch for a decoder of another base.
    """
    length = deployment.base.max_model_len
    base = of_base(deployment)
    with about("base.model"):
        _check_positions(deployment.base.model, length)
        linear = adapter_files.linear_modules(deployment.base.model)
    _check_kv_cache(deployment, base.shape)
    _check_own_layers(deployment, base.shape)
    _check_graphs(deployment)
    for number, pool in enumerate(deployment.decode):
        if pool.model:
            with about(f"decode.{number}.model"):
                _check_full(pool, pool.model, base)
                _check_positions(pool.model, length)
        _check_architecture(pool, deployment.base.model, f"decode.{number}.sharing")
        for name, folder in pool.adapters.items():
            with about(f"decode.{number}.adapters.{name}"):
                _check_adapter(pool, name, folder, base, linear)
    return base


def of_base(deployment: Deployment) -> DecoderContract:
    """The base's own contract, under the chat template that the deployment uses. Raises ConfigError for its files."""
    template = chat_template.text_of(deployment.base.chat_template)
    with about("base.model"):
        return DecoderContract.of_base(deployment.base.model, template=template)


def _check_positions(folder: str, length: int) -> None:
    config, rope = ModelConfig.read(folder), fingerprint.rope(fingerprint.read_json(folder, "config.json"))
    limit = config.max_position_embeddings
    if limit and rope["rope_type"] in ("linear", "dynamic"):  # these extend the limit; the others' limit includes that
        limit = int(limit * config.stretch)
    if limit and length > limit:
        raise ConfigError(
            f"{length} is more than the {limit} positions of {folder}", field="base.max_model_len", fix=f"use at most {limit}"
        )


def _check_kv_cache(deployment: Deployment, shape: KVShape) -> None:
    blocks = -(-deployment.base.max_model_len // deployment.base.block_size) + 1
    kv_gib = blocks * deployment.base.block_size * shape.bytes_per_token(deployment.base.dtype) / 2**30
    fields: list[tuple[str, Engines, tuple[int, ...]]] = [
        (f"decode.{n}", pool, ecache_layers([pool])) for n, pool in enumerate(deployment.decode)
    ]
    fields += [(f"decode.{n}.prefill", pool.prefill, ()) for n, pool in enumerate(deployment.decode) if pool.prefill]
    if deployment.shared_prefill:
        fields.append(("prefill", deployment.shared_prefill, ecache_layers(deployment.decode)))
    for field, engines, kept in fields:
        need_gib = kv_gib * (1 + len(kept) * ecache_share(deployment.base.model, shape))
        have_gib = engines.kv_cache_gib * engines.tensor_parallel_size
        if have_gib < need_gib:
            least = math.ceil(need_gib / engines.tensor_parallel_size * 1e4) / 1e4
            raise ConfigError(
                f"{engines.kv_cache_gib:g} GiB do not hold one sequence of {deployment.base.max_model_len} tokens",
                field=f"{field}.kv_cache_gib",
                fix=f"use at least {least:.4f}, or lower base.max_model_len",
            )


def ecache_share(base: str, shape: KVShape) -> float:
    """Cache that the inputs of one layer take, as a fraction of the cache for KV."""
    return ecache_parts(ModelConfig.read(base).hidden_size, shape.kv_heads, shape.head_size) / shape.layers


def _check_own_layers(deployment: Deployment, shape: KVShape) -> None:
    for number, pool in enumerate(deployment.decode):
        for name in pool.own_layers:
            field = f"decode.{number}.own_layers.{name}"
            for group in filter(None, _own_layers(pool, name)):
                if group.last >= shape.layers:
                    raise ConfigError(
                        f"{group} ends after layer {shape.layers - 1}, the base's last", field=field, fix="count from 0"
                    )
                if len(group) == shape.layers:
                    raise ConfigError(
                        f"{group} are all layers: nothing of the base would be used", field=field, fix="use sharing: none"
                    )
        if not ecache_layers([pool]):
            continue
        sizes = {pool.tensor_parallel_size, deployment.shared_prefill.tensor_parallel_size}
        if len(sizes) > 1:
            raise ConfigError(
                f"mode {pool.sharing} hands over hidden states rank by rank; {sizes} are different sizes",
                field=f"decode.{number}.tensor_parallel_size",
                fix=f"use prefill.tensor_parallel_size, {deployment.shared_prefill.tensor_parallel_size}",
            )


def _check_adapted(pool: DecodePool, folder: str, modules: Iterable[str]) -> None:
    allowed = get_mode(pool.sharing).adapter_modules
    adapted = {module.rsplit(".", 1)[-1] for module in modules}
    if allowed is not None and (wrong := adapted - allowed):
        raise ConfigError(
            f"{folder} adapts {', '.join(sorted(wrong))}, which mode {pool.sharing} never runs",
            fix=f"train it for mode {pool.sharing}: such an adapter changes {', '.join(sorted(allowed))}",
        )


def _check_architecture(pool: DecodePool, base: str, field: str) -> None:
    served = get_mode(pool.sharing).architectures
    if served is None:
        return
    for architecture in ModelConfig.read(base).architectures or ("a base without architectures",):
        if architecture not in served:
            raise ConfigError(
                f"mode {pool.sharing} cannot serve {architecture}",
                field=field,
                fix=f"use a base of {', '.join(sorted(served))}",
            )


def _check_graphs(deployment: Deployment) -> None:
    ours: list[tuple[str, Engines]] = [
        (f"decode.{number}", pool) for number, pool in enumerate(deployment.decode) if get_mode(pool.sharing).architectures
    ]
    if ecache_layers(deployment.decode):
        ours.append(("prefill", deployment.shared_prefill))
    for field, engines in ours:
        if "compilation_config" in engines.engine_args:
            raise ConfigError(
                "engines that do not run vLLM's own model set compilation_config themselves",
                field=f"{field}.engine_args.compilation_config",
                fix="leave it out: which batches can be captured as graphs depends on the requests in them",
            )


def _check_contract(pool: DecodePool, name: str, folder: str, base: DecoderContract) -> None:
    contract = DecoderContract.read(folder)
    contract.check(base, folder)
    if contract.own_tokens != (served := pool.own_tokens.get(name, 1)):
        raise ContractMismatch(
            f"{folder} was trained to compute the last {contract.own_tokens} tokens of a prompt itself, not {served}",
            fix="leave own_tokens out: it is read from the contract" if get_mode(pool.sharing).own_end else
            f"serve it in mode prefillshare: mode {pool.sharing} has a fixed boundary",
        )  # fmt: skip


def _check_full(pool: DecodePool, folder: str, base: DecoderContract) -> None:
    shape = KVShape.of(folder)
    if get_mode(pool.sharing).shares_prefill:
        _check_contract(pool, pool.name or pool.pool, folder, base)
        if shape != base.shape:
            raise ContractMismatch(
                f"{folder} has KV of {shape}, the base has {base.shape}", fix="serve a fine-tune of the base's own architecture"
            )
    # Sessions are token ids: all decoders must read these alike, whatever KV they use.
    if (mine := fingerprint.tokenizer(folder)) != base.base.tokenizer:
        raise ContractMismatch(
            f"{folder} has tokenizer {mine}, the base has {base.base.tokenizer}",
            fix="serve a fine-tune that kept the base's tokenizer",
        )
    fingerprint.weights(folder)


def _check_adapter(
    pool: DecodePool, name: str, folder: str, base: DecoderContract, linear: adapter_files.LinearModules
) -> None:
    settings = AdapterSettings.read(folder)
    if (rank := settings.highest_rank) > pool.max_lora_rank:
        enough = [allowed for allowed in get_args(DecodePool.model_fields["max_lora_rank"].annotation) if allowed >= rank]
        raise ConfigError(
            f"{folder} has rank {rank}, pool {pool.pool!r} makes room for {pool.max_lora_rank}",
            fix=f"set max_lora_rank of the pool to {enough[0]}" if enough else "train it with a lower rank",
        )
    _check_adapted(pool, folder, adapter_files.check(folder, settings, linear))
    if get_mode(pool.sharing).shares_prefill:
        _check_contract(pool, name, folder, base)
