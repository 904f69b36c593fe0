"""The process of one stage: python -m prefillshare.proof.stage NAME ASKED FILE_DESCRIPTOR

`ASKED`: an Asked as JSON. What the stage finds goes to the file descriptor, a line each (found.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from prefillshare.kvshare_vllm.engine import quick_start
from prefillshare.platform import on_cpu
from prefillshare.proof.asked import Asked
from prefillshare.proof.found import Part, Progress, line


def main(name: str, asked: str, descriptor: str) -> None:
    quick_start.pause()
    quick_start.end_soon()
    with os.fdopen(int(descriptor), "w", buffering=1) as pipe:

        def tell(told: Part | Progress) -> None:
            print(line(told), file=pipe)

        tell(Progress(0, 1, "importing vLLM"))
        from prefillshare.proof.stages import stages  # after the pause: it imports transformers

        stage = stages()[name]
        _import_engines(stage.engines)
        quick_start.resume()
        asyncio.run(stage.run(Asked(**json.loads(asked)), tell))


def _import_engines(engines: int) -> None:
    """Import vLLM, and on CPUs fork a process for each engine, so that engines do not import it once more."""
    if not engines or not on_cpu():
        return
    from prefillshare.kvshare_vllm.forkserver import server, spare

    server.preload(server.OF_ENGINES)
    for _ in range(engines):
        spare.make()


if __name__ == "__main__":
    main(*sys.argv[1:])
