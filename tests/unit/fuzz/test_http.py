"""The HTTP surface by its own description: Schemathesis derives requests from it, right, wrong and in sequence, and none may
end in an error of the server, or in a refusal that does not say why. The app is vLLM's whole app as it is served; turns answer
what they are told.
"""

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import uvicorn
from ports import free_port
from told_logprobs import logprobs

from benchmarks.chats.surface import ChatSurface

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[2]
#: Seconds of each phase; seeds are fixed. More: FUZZ_S=600.
SECONDS = int(os.environ.get("FUZZ_S", "15"))


class Surface(ChatSurface):
    """Turns tell log-probabilities, too, if they are asked for them."""

    def _turn(self, call):
        turn = super()._turn(call)
        if (asked := call.sampling.logprobs) is not None:
            turn.chunks = partial(self._with_logprobs, turn.chunks(), max(0, asked))
        return turn

    @staticmethod
    async def _with_logprobs(chunks, likeliest: int):
        async for chunk in chunks:
            (token,) = chunk.token_ids
            yield replace(chunk, logprobs=logprobs((token, -0.5), *((100 + place, -1.0) for place in range(likeliest))))


@pytest.fixture(scope="module")
def url(smollm):
    port, surface, started = free_port(), Surface(str(smollm)), threading.Event()

    async def serve():
        await surface.start()
        server = uvicorn.Server(uvicorn.Config(surface.app, port=port, log_level="error", access_log=False))
        serving = asyncio.create_task(server.serve())
        started.set()
        await asyncio.to_thread(ended.wait)
        server.should_exit = True
        await serving
        await surface.stop()

    ended = threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(120)
    for _ in range(100):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    ended.set()
    thread.join(20)


@pytest.mark.parametrize("phase", ["coverage", "fuzzing", "stateful"])
def test_no_request_ends_in_an_error_of_the_server_or_a_refusal_without_a_reason(url, phase, tmp_path):
    checks = "not_a_server_error,refusals_say_what_is_wrong"
    command = [
        Path(sys.executable).with_name("st"), "run", f"{url}/openapi.json", "--phases", phase, "--checks", checks,
        "--seed", "1", "--max-time", str(SECONDS), "--request-timeout", "30", "--continue-on-failure", "--warnings", "off",
        "--suppress-health-check", "all", "--generation-database", "none", "--no-color",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(TESTS), "SCHEMATHESIS_HOOKS": "http_checks"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=20 * SECONDS + 120)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* generated", done.stdout), done.stdout
