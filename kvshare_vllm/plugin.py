"""vLLM plugin entry point (`vllm.general_plugins`). vLLM may load it several times per process: idempotent."""

from __future__ import annotations

import multiprocessing
import os

#: Environment variable: if set, engines on GPUs compute adapters' deltas in plain torch, too. vLLM's kernels for GPUs take no
#: float32, in which `prefillshare prove` compares (proof/exact.py).
TORCH_ADAPTERS = "PREFILLSHARE_TORCH_ADAPTERS"


def register() -> None:
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    from prefillshare.kvshare_vllm.engine import kv_events, orphans, quick_start
    from prefillshare.kvshare_vllm.models import families
    from prefillshare.kvshare_vllm.patches import gentle_grammars, gloo_loops, nixl_handshakes, vllm_logging
    from prefillshare.kvshare_vllm.transfer.transports import TRANSPORTS

    if multiprocessing.parent_process() is not None:  # an engine's own process; others call vllm_logging.set_up
        vllm_logging.share_with_ours()
        orphans.end_with_parent()
        quick_start.end_soon()
        if current_platform.is_cpu():
            quick_start.stay_frozen()
    for transport in TRANSPORTS.values():
        transport.register()
    kv_events.register()
    nixl_handshakes.protect()
    gloo_loops.share()
    gentle_grammars.compile_behind_steps()
    for architecture, where in families.registered():
        ModelRegistry.register_model(architecture, where)
    if current_platform.is_cpu():
        from prefillshare.kvshare_vllm.patches import amx_tiles, nixl_cores

        nixl_cores.wait_for_events()
        nixl_cores.keep_affinity()
        amx_tiles.ask()
    if current_platform.is_cpu() or os.environ.get(TORCH_ADAPTERS):
        from prefillshare.kvshare_vllm.patches import cpu_adapters

        cpu_adapters.use()
    quick_start.resume()
