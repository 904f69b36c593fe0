"""vLLM's logging leaves the log handlers of others open; what vLLM does by itself would close them."""

import subprocess
import sys

import pytest

SCRIPT = """
import logging, logging.handlers, sys
target = logging.StreamHandler(sys.stderr)
theirs = logging.handlers.MemoryHandler(1, target=target)
logging.getLogger("ray.serve").addHandler(theirs)
from kvshare_vllm import vllm_logging
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging_if_needed
{before}
configure_logging_if_needed(LoggingConfig())
assert logging.getLogger("vllm").handlers
print("open" if theirs.target is target else "closed")
"""


@pytest.mark.parametrize(("before", "then"), [("vllm_logging.set_up()", "open"), ("", "closed")])
def test_handlers_of_others_are_open_after_vllm_has_set_up_its_own(before, then):
    script = SCRIPT.format(before=before)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == [then], done.stderr
