"""The transports of KV by the names of `cluster.kv_transport`: a folder each, with a profile and a connector."""

from __future__ import annotations

from types import ModuleType

from prefillshare.kvshare_vllm.transfer.nixl import profile as nixl

TRANSPORTS: dict[str, ModuleType] = {"nixl": nixl}
