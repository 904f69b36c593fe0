"""The transports of KV, by their names in `cluster.kv_transport`: each is a folder with a profile and a connector."""

from __future__ import annotations

from types import ModuleType

from prefillshare.kvshare_vllm.transfer.nixl import profile as nixl

TRANSPORTS: dict[str, ModuleType] = {"nixl": nixl}
