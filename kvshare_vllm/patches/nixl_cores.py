"""Keeps NIXL off the model's cores. CPU builds only.

 - NIXL 1.5's Python API asks for a poll timeout of zero, so that its progress thread takes one core per engine for itself: on
   CPUs that is a core the model does not get (decode ran at a sixth of its speed on two cores). With a timeout the thread
   sleeps in poll() and wakes on events, as it was designed to.
 - vLLM's connectors move the thread that makes them to each NUMA node's last core, to load KV there. That is the thread that
   runs the model: engines that were bound to different cores would all run on that one. It goes back to its own cores; threads
   that the connector has started stay where they are.

Seam: nixl/_api.py, nixl_agent.__init__ (`agent_config.pthrDelay = 0`); vLLM's nixl/base_worker.py (`rsv_cores_for_kv`)

Goes when: NIXL's Python API takes a poll timeout, and vLLM leaves the thread that makes a connector where it is.
"""

from __future__ import annotations

import importlib
import os

#: The thread wakes for every event whatever this is. With 1 ms it also woke a thousand times a second for nothing, on the core
#: of the model's first thread, for which the others wait: a decode step on two cores took a twelfth longer.
POLL_TIMEOUT_US = 100_000


def wait_for_events() -> None:
    """From now on, NIXL agents made in this process poll with a timeout. May be called again."""
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # as vLLM does before it imports NIXL
    try:
        bindings = importlib.import_module("nixl._api").nixlBind
    except ImportError:
        return  # no NIXL, no thread
    if hasattr(bindings.nixlAgentConfig, "spins"):
        return

    class WaitingConfig(bindings.nixlAgentConfig):
        spins = False

        def __setattr__(self, name, value):
            super().__setattr__(name, max(value, POLL_TIMEOUT_US) if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = WaitingConfig


def keep_affinity() -> None:
    """From now on, vLLM's NIXL connectors leave the thread that makes them on its cores. May be called again."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker as Worker

    stock = Worker.__init__
    if hasattr(stock, "keeps_affinity"):
        return

    def init(self, *args, **kwargs) -> None:
        bound = os.sched_getaffinity(0)
        try:
            stock(self, *args, **kwargs)
        finally:
            os.sched_setaffinity(0, bound)

    init.keeps_affinity = True
    Worker.__init__ = init
