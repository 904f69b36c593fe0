"""Calls to the engine's own processes in addition to vLLM's: its `worker_extension_cls`."""

from prefillshare.kvshare_vllm.engine.adapters import AdapterWeights
from prefillshare.kvshare_vllm.models.families import BaseKV
from prefillshare.kvshare_vllm.patches.vllm_logging import LogLevel


class WorkerCalls(LogLevel, AdapterWeights, BaseKV):
    pass
