"""`prefillshare serve` as an operator runs it: a process, a signal, turns that go on to their end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from conftest import wait_until
from ports import free_port
from test_system_llama import deployment, ids

from kvshare.errors import Unavailable
from prefillshare.client import Client

pytestmark = pytest.mark.engine


def test_sigterm_lets_the_running_turn_end_and_the_process_goes_with_status_zero(tmp_path, smollm):
    data = deployment(tmp_path, smollm, "llama")
    port = free_port()
    data |= {"decode": data["decode"][:1], "router": {"http_port": free_port(), "grpc_port": port}}
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(data))
    command = Path(sys.executable).with_name("prefillshare")
    process = subprocess.Popen([command, "serve", tmp_path / "d.yaml"])
    try:
        with Client(f"127.0.0.1:{port}") as client:

            def ready():
                assert process.poll() is None, "the server ended before it was ready"
                try:
                    return client.not_ready_because() == ""
                except Unavailable:
                    return False

            wait_until(ready, timeout_s=180, step_s=1)
            told = subprocess.run([command, "status", "--json"], capture_output=True, text=True, timeout=120)
            assert told.returncode == 0, told.stderr
            found = json.loads(told.stdout)
            assert {decoder["decoder"] for decoder in found["decoders"]} == {d.name for d in client.decoders()}
            assert len({decoder["base_fingerprint"] for decoder in found["decoders"]}) == 1
            assert {replica["pool"] for replica in found["replicas"]} == {"prefill", data["decode"][0]["pool"]}
            assert all(replica["usable"] and replica["stats"]["blocks_total"] for replica in found["replicas"])

            stream = client.create_session().stream("a", token_ids=ids(40), max_tokens=120, ignore_eos=True)
            pieces = [next(stream)]
            reader = threading.Thread(target=lambda: pieces.extend(stream))
            reader.start()
            process.send_signal(signal.SIGTERM)
            reader.join(timeout=40)
            assert pieces[-1].done.usage.completion_tokens == 120
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
