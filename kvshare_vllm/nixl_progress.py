"""NIXL's progress thread, made to wait for events instead of spinning. CPU builds only.

NIXL 1.5's Python API asks for a poll timeout of zero, so that the thread takes one core per engine for itself: on CPUs
that is a core the model does not get (decode ran at a sixth of its speed on two cores). With a timeout the thread
sleeps in poll() and wakes on events, as it was designed to.

Seam: nixl/_api.py, nixl_agent.__init__ (`agent_config.pthrDelay = 0`)
"""

from __future__ import annotations

import importlib
import os

POLL_TIMEOUT_US = 1000


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
