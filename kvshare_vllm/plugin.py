"""vLLM plugin entry point (`vllm.general_plugins`). vLLM may load it several times per process: idempotent."""

from __future__ import annotations

CONNECTOR = "SharedKVConnector"


def register() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "kvshare_vllm.connector", CONNECTOR)
