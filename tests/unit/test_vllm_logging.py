"""No library that sets up its logging closes the log handlers of others; what each does by itself would close them."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import logging, logging.config, logging.handlers, sys
from prefillshare.kvshare_vllm.patches import vllm_logging

def a_library_of_that_kind():
    own = {"own": {"class": "logging.StreamHandler"}}
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "handlers": own, "root": {"handlers": ["own"]}})
    assert logging.getLogger().handlers

def nixl():
    import nixl
    assert logging.getLogger("nixl").handlers

def vllm():
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed
    configure_logging_if_needed(LoggingConfig())
    assert logging.getLogger("vllm").handlers

GUARD
for library in (a_library_of_that_kind, nixl, vllm):
    target = logging.StreamHandler(sys.stderr)
    theirs = logging.handlers.MemoryHandler(1, target=target)
    logging.getLogger("ray.serve").addHandler(theirs)
    library()
    print(library.__name__, "open" if theirs.target is target else "closed", file=sys.stderr)
"""


@pytest.mark.parametrize(("guard", "then"), [("vllm_logging.set_up()", "open"), ("pass", "closed")])
def test_handlers_of_others_are_open_after_a_library_has_set_up_its_own(guard, then):
    done = subprocess.run([sys.executable, "-c", SCRIPT.replace("GUARD", guard)], capture_output=True, text=True, timeout=120)
    told = dict(line.split() for line in done.stderr.splitlines() if line.endswith((" open", " closed")))
    assert told == dict.fromkeys(("a_library_of_that_kind", "nixl", "vllm"), then), done.stderr


OURS = """
import json, logging
from prefillshare.kvshare_vllm.patches import vllm_logging
vllm_logging.set_up("{level}", "{form}")
vllm_logging.set_up("{level}", "{form}")
log = logging.getLogger("prefillshare.router.turn.orchestrator")
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
    us, them = "prefillshare.router.turn.orchestrator", "vllm.engine"
    ours = [(one["levelname"], one["name"], one["message"]) for one in told if one["name"] in (us, them)]
    assert ours == [("INFO", us, "one"), ("DEBUG", us, "two"), ("DEBUG", them, "three")]
    assert next(one for one in told if one["message"] == "one")["request_id"] == "r1"


def test_what_is_below_the_level_is_not_written():
    text = "\n".join(lines("warning", "text"))
    assert "one" not in text
    assert "two" in text
