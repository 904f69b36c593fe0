"""Makes the settings of all engines of a deployment from its config, under one KV contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefillshare.kvshare import decoders
from prefillshare.kvshare.config import Deployment, Engines
from prefillshare.kvshare.contract import KVContract
from prefillshare.kvshare.engine_settings import SHARED_PREFILL, EngineSettings, own_prefill
from prefillshare.kvshare.modes import get_mode, modes
from prefillshare.platform import vllm_build


def kv_contract(deployment: Deployment, check_files: bool = True) -> KVContract:
    """Check every decoder's files and return the contract under which all engines of the deployment start. `check_files`: False
    for a deployment that runs already, whose files may be gone."""
    base = decoders.check_files(deployment) if check_files else decoders.of_base(deployment)
    return KVContract(
        base=base.base,
        shape=base.shape,
        dtype=deployment.base.dtype,
        block_size=deployment.base.block_size,
        engine=vllm_build(),
        transport=deployment.cluster.kv_transport,
        ecache_layers=decoders.ecache_layers(deployment.decode),
    )


def engine_settings(deployment: Deployment, check_files: bool = True) -> dict[str, tuple[EngineSettings, Engines]]:
    """Serve deployment name -> (its engines' settings, their section of the config). `check_files`: as for kv_contract."""
    contract, base, tracing = kv_contract(deployment, check_files), deployment.base, deployment.tracing
    traces = {"traces_endpoint": tracing.otlp_endpoint, "traces_protocol": tracing.protocol} if tracing else {}

    def settings(role: str, pool: str, engines: Engines, mode: str, model: str, **more) -> tuple[EngineSettings, Engines]:
        more = {"contract": contract.digest} | more
        return EngineSettings(
            role=role,
            pool=pool,
            model=model,
            mode=mode,
            dtype=base.dtype,
            max_model_len=base.max_model_len,
            block_size=base.block_size,
            kv_cache_bytes=int(engines.kv_cache_gib * 2**30),
            tensor_parallel_size=engines.tensor_parallel_size,
            max_num_seqs=engines.max_num_seqs,
            max_num_batched_tokens=engines.max_num_batched_tokens,
            lease_s=deployment.cluster.kv_lease_s,
            kv_transport=deployment.cluster.kv_transport,
            cpu_cores=engines.cpu_cores,
            log_level=deployment.logs.level,
            log_format=deployment.logs.format,
            **traces,
            engine_args=_engine_args(engines),
            **more,
        ), engines

    result = {}
    if prefill := deployment.shared_prefill:
        # Independent of the modes that draw on it, so that pools that come and go do not restart it.
        sharing = next(mode.name for mode in modes() if mode.shares_prefill)
        result[SHARED_PREFILL] = settings(
            "prefill", SHARED_PREFILL, prefill, sharing, base.model, ecache_layers=contract.ecache_layers
        )
    for pool in deployment.decode:
        model = pool.model or base.model
        lora = {"adapters": pool.adapters, "max_lora_rank": pool.max_lora_rank, "max_loras": pool.max_loras}
        if get_mode(pool.sharing).shares_prefill:
            lora["prefill_ecache_layers"] = contract.ecache_layers
        else:
            lora["contract"] = f"{contract.digest} of {pool.pool}"  # its KV is of its own weights
            name = own_prefill(pool.pool)
            result[name] = settings("prefill", name, pool.own_prefill(), pool.sharing, model, **lora)
        lora |= {"ecache_layers": decoders.ecache_layers([pool]), "makes_base_kv": pool.makes_base_kv}
        result[pool.pool] = settings("decode", pool.pool, pool, pool.sharing, model, **lora)
    return result


def _engine_args(engines: Engines) -> Mapping[str, Any]:
    """vLLM does not start if less memory is free than the part of a GPU that an engine may claim, by default nearly all."""
    if engines.gpu_share == 1:
        return engines.engine_args
    return {"gpu_memory_utilization": round(0.9 * engines.gpu_share, 3), **engines.engine_args}


def fields(deployment: Deployment) -> dict[str, str]:
    """Serve deployment name -> field of the deployment file that describes its engines; "" -> that of the base."""
    result = {"": "base", SHARED_PREFILL: "prefill"}
    for number, pool in enumerate(deployment.decode):
        result[pool.pool] = f"decode.{number}"
        result[own_prefill(pool.pool)] = f"decode.{number}.prefill" if pool.prefill else f"decode.{number}"
    return result
