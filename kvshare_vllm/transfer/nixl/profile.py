"""What engines that move KV over NIXL are started with.

Seam: vllm/config/kv_transfer.py; vllm/distributed/kv_transfer/kv_connector/v1/nixl/base_worker.py (extra config)
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.platforms import current_platform

from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.modes import get_mode

_CONNECTOR = "SharedKVConnector"
#: Engines that load KV keep freed blocks until no step writes to them any more (vLLM's `is_kv_consumer`).
_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
_ROLE_OF_SHARED_PREFILL = "kv_both"
#: Most seconds that a decode engine keeps what it has lent. The router gives up before (router/ahead/pull_back.py, PATIENCE_S).
LOAN_S = 15


def register() -> None:
    """Have vLLM find the connector by its name. May be called again."""
    if _CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(_CONNECTOR, "prefillshare.kvshare_vllm.transfer.nixl.connector", _CONNECTOR)


def kv_transfer_config(s: EngineSettings) -> dict[str, Any]:
    """vLLM's engine argument of that name."""
    mode = get_mode(s.mode)
    extra: dict[str, Any] = {
        "kv_lease_duration": s.lease_s,
        "sharing_mode": s.mode,
        "kv_contract": s.contract,
        "prefill_ecache_layers": list(s.ecache_layers if s.role == "prefill" else s.prefill_ecache_layers),
        "overlap_loads": s.overlap_loads,
        "makes_base_kv": s.makes_base_kv,
    }
    config: dict[str, Any] = {
        "kv_connector": _CONNECTOR,
        "kv_role": _ROLES[s.role],
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }
    pulls = s.role == "prefill" and mode.shares_prefill
    if pulls:
        config["kv_role"] = _ROLE_OF_SHARED_PREFILL
    if pulls or mode.lends_responses:  # decode engines lend what they generated, the prefill pool pulls it
        extra |= {
            "bidirectional_kv_xfer": True,
            "decoder_kv_blocks_ttl": min(s.lease_s, LOAN_S),
            "kv_recompute_threshold": 0,  # the router decides
        }
    if current_platform.is_cpu():
        config["kv_buffer_device"] = "cpu"
    return config
