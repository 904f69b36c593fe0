"""What the engine's own processes can be told and asked, beside vLLM's own calls: its `worker_extension_cls`."""

from prefillshare.kvshare_vllm.engine.adapters import AdapterWeights
from prefillshare.kvshare_vllm.patches.vllm_logging import LogLevel


class WorkerCalls(LogLevel, AdapterWeights):
    pass
