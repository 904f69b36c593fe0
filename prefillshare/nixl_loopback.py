"""A NIXL read between two agents of one process: `python -m prefillshare.nixl_loopback BACKEND`.

Its last line is JSON: the installed backends, and the bytes per second of a read of 16 MiB. `prefillshare doctor` runs it as a
separate process, because a transport that is set up wrongly may end the process.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np

SIZE, LIMIT_S = 16 << 20, 20.0


def read(backend: str) -> dict:
    """Read once. Raises RuntimeError if the data read differ from the source, or if it takes more than LIMIT_S."""
    from nixl._api import nixl_agent, nixl_agent_config

    config = nixl_agent_config(backends=[backend])
    source, target = nixl_agent("source", config), nixl_agent("target", config)
    there, here = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    for agent, data in ((source, there), (target, here)):
        agent.register_memory([(data.ctypes.data, SIZE, 0, "")], "DRAM")
    name = target.add_remote_agent(source.get_agent_metadata())
    local, remote = (target.get_xfer_descs([(data.ctypes.data, SIZE, 0)], "DRAM") for data in (here, there))
    handle = target.initialize_xfer("READ", local, remote, name, b"")
    began = time.perf_counter()
    state = target.transfer(handle)
    while state == "PROC" and time.perf_counter() - began < LIMIT_S:
        state = target.check_xfer_state(handle)
    seconds = time.perf_counter() - began
    if state != "DONE":
        raise RuntimeError(f"the read did not end within {LIMIT_S:g} s" if state == "PROC" else f"the read ended with {state}")
    if not np.array_equal(there, here):
        raise RuntimeError("what was read is not what was there")
    return {"backends": sorted(source.get_plugin_list()), "bytes_per_s": SIZE / seconds}


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1])), flush=True)
    os._exit(0)  # plugins for hardware that is not there may break when they are unloaded, which says nothing about the read
