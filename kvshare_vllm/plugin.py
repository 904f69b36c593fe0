"""vLLM plugin entry point (`vllm.general_plugins`). vLLM may load it several times per process: idempotent."""

from __future__ import annotations

CONNECTOR = "SharedKVConnector"


def register() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.platforms import current_platform

    from kvshare_vllm import kv_events

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "kvshare_vllm.connector", CONNECTOR)
    kv_events.register()
    if current_platform.is_cpu():
        from kvshare_vllm.nixl_progress import wait_for_events

        wait_for_events()
