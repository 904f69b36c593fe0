"""What Ray has to say to a process that started or joined a cluster is in a file: the output is the command's own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
from ray._private import worker

from prefillshare import ray_messages, records


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(records.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    loggers = [logging.getLogger(name) for name in ("ray", "ray.serve")]
    before = [(one, list(one.handlers), one.propagate) for one in loggers]
    ray_messages.logger.handlers.clear()
    ray_messages.to_file()
    yield records.folder() / ray_messages.NAME
    for handler in ray_messages.logger.handlers:
        handler.close()
    for one, handlers, propagate in before:
        one.handlers[:], one.propagate = handlers, propagate


def test_messages_are_written_to_the_file_and_not_printed(file, capfd):
    worker.print_to_stdstream({"lines": ["A worker died."], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    again = "Task ServeController.listen_for_change failed. There are infinite retries remaining"
    worker.print_to_stdstream({"lines": [again], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert file.read_text().endswith("WARNING ray: raylet: A worker died.\n")
    assert again not in file.read_text()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["ray.serve", "ray._private.authentication.authentication_token_setup"])
def test_log_lines_are_written_once_and_not_printed(file, capfd, name):
    ray_messages.to_file()
    logging.getLogger(name).warning("Token authentication is enabled")
    assert file.read_text().count("Token authentication is enabled") == 1
    assert capfd.readouterr() == ("", "")


def test_the_file_is_bounded(file, monkeypatch):
    (handler,) = (one for one in ray_messages.logger.handlers if hasattr(one, "maxBytes"))
    monkeypatch.setattr(handler, "maxBytes", 1000)
    for number in range(100):
        ray_messages.logger.warning("line %d of a process that says a lot", number)
    assert sum(one.stat().st_size for one in file.parent.glob("ray.log*")) <= 2000


#: Ray takes its loggers' handlers away, and gives them others, when it starts.
STARTS = """
import logging, ray
from types import SimpleNamespace
from prefillshare import cluster
ray._private.worker.connect = ray._private.worker.BaseTestHook = None
try:
    cluster._init("127.0.0.1:1", "failed", "fix", num_gpus="wrong")
except Exception:
    pass
logging.getLogger("ray.serve").warning("Failed to get queue length")
logging.getLogger("ray").warning("Found multiple active Ray instances")
"""


@pytest.mark.slow
def test_nothing_is_printed_after_ray_has_set_up_its_loggers(file):
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"TMPDIR": str(file.parents[1])})  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")
    assert "Failed to get queue length" in file.read_text()
    assert "Found multiple active" in file.read_text()
