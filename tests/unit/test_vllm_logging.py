"""vLLM's logging leaves the log handlers of others open; what vLLM does by itself would close them."""

import json
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


OURS = """
import json, logging
from kvshare_vllm import vllm_logging
vllm_logging.set_up("{level}", "{form}")
vllm_logging.set_up("{level}", "{form}")
log = logging.getLogger("router.orchestrator")
log.info("one", extra={{"request_id": "r1"}})
vllm_logging.set_level("debug")
log.debug("two")
logging.getLogger("vllm.engine").debug("three")
vllm_logging.set_level("error")
log.warning("four")
logging.getLogger("vllm.engine").warning("five")
"""


def lines(level: str, form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", OURS.format(level=level, form=form)], capture_output=True, text=True, timeout=120, check=True
    )
    return [line for line in done.stdout.splitlines() if line.strip()]


def test_our_modules_write_what_vllms_do_in_its_format_and_at_a_level_that_changes():
    told = [json.loads(line) for line in lines("info", "json")]
    of = ("router.orchestrator", "vllm.engine")
    ours = [(one["levelname"], one["name"], one["message"]) for one in told if one["name"] in of]
    assert ours == [
        ("INFO", "router.orchestrator", "one"), ("DEBUG", "router.orchestrator", "two"), ("DEBUG", "vllm.engine", "three"),
    ]  # fmt: skip
    assert next(one for one in told if one["message"] == "one")["request_id"] == "r1"


def test_what_is_below_the_level_is_not_written():
    text = "\n".join(lines("warning", "text"))
    assert "one" not in text
    assert "two" in text
