"""No library that sets up its logging closes the log handlers of others; what each does by itself would close them."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

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


OURS = """
import logging
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

CASES = {
    "guarded": SCRIPT.replace("GUARD", "vllm_logging.set_up()"),
    "unguarded": SCRIPT.replace("GUARD", "pass"),
    "json": OURS.format(level="info", form="json"),
    "warning": OURS.format(level="warning", form="text"),
}

#: Each case in a process of its own, forked from one that has imported what takes long.
FORKS = """
import json, os, sys
import vllm.config.logging, vllm.logger
for name, script in json.loads(sys.stdin.read()).items():
    if os.fork() == 0:
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[1]}/{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
        exec(compile(script, name, "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Case -> what it has written to (standard output, standard error)."""
    folder = tmp_path_factory.mktemp("cases")
    command = [sys.executable, "-c", FORKS, str(folder)]
    subprocess.run(command, input=json.dumps(CASES), text=True, timeout=120, check=True)
    return {name: tuple((folder / f"{name}.{stream}").read_text() for stream in ("out", "err")) for name in CASES}


@pytest.mark.parametrize(("case", "then"), [("guarded", "open"), ("unguarded", "closed")])
def test_handlers_of_others_are_open_after_a_library_has_set_up_its_own(written, case, then):
    _, errors = written[case]
    told = dict(line.split() for line in errors.splitlines() if line.endswith((" open", " closed")))
    assert told == dict.fromkeys(("a_library_of_that_kind", "nixl", "vllm"), then), errors


def test_our_modules_write_what_vllms_do_in_its_format_and_at_a_level_that_changes(written):
    told = [json.loads(line) for line in written["json"][0].splitlines() if line.strip()]
    us, them = "prefillshare.router.turn.orchestrator", "vllm.engine"
    ours = [(one["levelname"], one["name"], one["message"]) for one in told if one["name"] in (us, them)]
    assert ours == [("INFO", us, "one"), ("DEBUG", us, "two"), ("DEBUG", them, "three")]
    assert next(one for one in told if one["message"] == "one")["request_id"] == "r1"


def test_what_is_below_the_level_is_not_written(written):
    text, _ = written["warning"]
    assert "one" not in text
    assert "two" in text
