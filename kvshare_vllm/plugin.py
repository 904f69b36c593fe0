"""vLLM plugin entry point (`vllm.general_plugins`). vLLM may load it several times per process: idempotent."""

from __future__ import annotations

import multiprocessing

from prefillshare.kvshare.modes import modes
from prefillshare.kvshare_vllm.names import PARTIAL_LAYERS, TWO_STREAMS

_MODELS = "prefillshare.kvshare_vllm.models"


def register() -> None:
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    from prefillshare.kvshare_vllm.engine import kv_events, quick_start
    from prefillshare.kvshare_vllm.patches import gentle_grammars, gloo_loops, nixl_handshakes, vllm_logging
    from prefillshare.kvshare_vllm.transfer.transports import TRANSPORTS

    if multiprocessing.parent_process() is not None:  # an engine's own process; others call vllm_logging.set_up
        vllm_logging.share_with_ours()
    for transport in TRANSPORTS.values():
        transport.register()
    kv_events.register()
    nixl_handshakes.protect()
    gloo_loops.share()
    gentle_grammars.compile_behind_steps()
    for stock in {name for mode in modes() if mode.two_streams for name in mode.architectures}:
        ModelRegistry.register_model(TWO_STREAMS + stock, f"{_MODELS}.two_streams:{TWO_STREAMS}{stock}")
    for stock in {name for mode in modes() if mode.recomputes for name in mode.architectures}:
        ModelRegistry.register_model(PARTIAL_LAYERS + stock, f"{_MODELS}.own_layers:{PARTIAL_LAYERS}{stock}")
    if current_platform.is_cpu():
        from prefillshare.kvshare_vllm.patches import cpu_adapters, nixl_cores

        nixl_cores.wait_for_events()
        nixl_cores.keep_affinity()
        cpu_adapters.use()
    quick_start.resume()
