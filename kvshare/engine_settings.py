"""Everything one engine replica is started with. Made by the app builder from the config; plain data, picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

#: vLLM engine arguments that are decided by the deployment's own fields, or that would change what KV means (R4).
OUR_ENGINE_ARGS = frozenset({
    "model", "tokenizer", "dtype", "max_model_len", "block_size", "tensor_parallel_size", "max_num_seqs",
    "max_num_batched_tokens", "kv_cache_memory_bytes", "kv_cache_dtype", "hf_overrides", "enable_prefix_caching",
    "enable_lora", "max_loras", "max_lora_rank", "kv_transfer_config", "scheduler_cls", "worker_cls", "generation_config",
    "disable_log_stats", "kv_events_config", "scheduling_policy", "served_model_name", "otlp_traces_endpoint",
    "logging_config", "log_level", "log_config_file", "worker_extension_cls", "structured_outputs_config",
    "specialize_active_lora",  # it takes all rows of a request for alike, and those of a shared prefix are the base's
})


@dataclass(frozen=True)
class EngineSettings:
    """`role`: "prefill" or "decode". Sizes: tokens, bytes, seconds."""

    role: str
    #: Name of the pool, for logs and metrics.
    pool: str
    model: str
    #: Sharing mode's name (kvshare.modes).
    mode: str
    #: Digest of the KV contract this engine's KV is made or read under.
    contract: str
    dtype: str
    max_model_len: int
    block_size: int
    kv_cache_bytes: int
    #: Layers whose inputs (hidden states) the engine's cache has room for beside the KV, in order: a prefill engine keeps them,
    #: a decode engine begins with them.
    ecache_layers: tuple[int, ...] = ()
    #: Decode engines: `ecache_layers` of the prefill engines that they read from.
    prefill_ecache_layers: tuple[int, ...] = ()
    #: Decode engines that compute layers themselves: whether to begin with these while the other layers' KV is still being
    #: loaded. "pays": if that is expected to be faster (kvshare_vllm/transfer/load_overlap.py); "always"; "never".
    overlap_loads: str = "pays"
    #: Decode engines: they hold the base, and may make the KV of a shared prefix themselves.
    makes_base_kv: bool = False
    #: Name -> folder of the LoRA adapters this engine serves.
    adapters: Mapping[str, str] = field(default_factory=dict)
    max_lora_rank: int = 16
    #: Number of places for adapters, which `adapters` may not exceed when it grows while the engine runs.
    max_loras: int = 8
    tensor_parallel_size: int = 1
    max_num_seqs: int = 128
    max_num_batched_tokens: int | None = None
    lease_s: int = 60
    #: As in the config's Cluster (kvshare_vllm/transfer/transports.py).
    kv_transport: str = "nixl"
    #: CPU build only: cores this engine computes on ("0" or "0-3"); None lets vLLM choose.
    cpu_cores: str | None = None
    #: Port of the NIXL side channel; None takes a free one.
    side_channel_port: int | None = None
    #: As in the config's Logs. The level can change while the engine runs.
    log_level: str = "info"
    log_format: str = "text"
    #: Where OpenTelemetry spans go, and how ("grpc" or "http/protobuf"); None: no spans are made.
    traces_endpoint: str | None = None
    traces_protocol: str = "grpc"
    #: Further vLLM engine arguments, as given in the config (`engine_args`).
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changeable(self) -> dict[str, Any]:
        """The settings that a running engine takes over, as plain data."""
        return {"adapters": dict(self.adapters), "log_level": self.log_level}

    @property
    def fixed(self) -> object:
        """The settings whose change replaces the engine; among them, whether it has room for adapters at all."""
        return replace(self, adapters={}, log_level=""), bool(self.adapters)


#: Name of the prefill engines that all sharing pools draw on.
SHARED_PREFILL = "prefill"


def own_prefill(pool: str) -> str:
    """Name of the prefill engines that belong to one decode pool alone."""
    return f"prefill-{pool}"
