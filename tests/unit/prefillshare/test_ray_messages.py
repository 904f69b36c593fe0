"""Ray's messages to the process that started a cluster are log lines: standard output is the command's own."""

import logging

import pytest
from ray._private import worker

from prefillshare import ray_messages


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)


def test_they_are_logged_and_not_printed(caplog, capfd):
    ray_messages.log_instead_of_printing()
    with caplog.at_level(logging.INFO):
        worker.print_to_stdstream({"lines": ["A worker died."], "pid": "raylet", "is_err": False}, ignore_prefix=False)
        again = "Task ServeController.listen_for_change failed. There are infinite retries remaining"
        worker.print_to_stdstream({"lines": [again], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", "raylet: A worker died.")]
    assert capfd.readouterr() == ("", "")
