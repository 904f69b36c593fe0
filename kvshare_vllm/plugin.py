"""vLLM plugin entry point (`vllm.general_plugins`). vLLM may load it several times per process: idempotent."""

from __future__ import annotations

CONNECTOR = "SharedKVConnector"
#: Architecture of a base -> the model that runs it with a decoder stream beside.
TWO_STREAM_MODELS = {"LlamaForCausalLM": "IcarusLlamaForCausalLM", "Qwen3ForCausalLM": "IcarusQwen3ForCausalLM"}


def register() -> None:
    from vllm import ModelRegistry
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.platforms import current_platform

    from kvshare_vllm import kv_events

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "kvshare_vllm.connector", CONNECTOR)
    kv_events.register()
    for name in TWO_STREAM_MODELS.values():
        ModelRegistry.register_model(name, f"kvshare_vllm.models.two_streams:{name}")
    if current_platform.is_cpu():
        from kvshare_vllm.nixl_progress import wait_for_events

        wait_for_events()
