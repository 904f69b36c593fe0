"""Sets up vLLM's logging without closing others' log handlers, and gives our own modules the same format and level.

Libraries set up their logging by `logging.config.dictConfig`, which closes every handler of the process: vLLM does so when its
first engine is made, NIXL when it is imported. In a replica that would close Serve's handlers. The replica would stop writing
to its log file and could not tell Serve where that file is: a controller that has died and come back would take the replica for
broken and stop it. So `dictConfig` closes nothing in a replica's process.

Seam: logging.config (`_clearExistingHandlers`); vllm/logger.py (`configure_logging_if_needed`), vllm/config/logging.py;
nixl/logging.py; ray/serve/_private/logging_utils.py (`get_component_logger_file_path`)

Goes when: neither vLLM nor NIXL closes handlers that others have set up.
"""

from __future__ import annotations

import logging
import logging.config

#: What our loggers' names begin with; they write where vLLM's logger writes.
OURS = "prefillshare"


def config(level: str = "info", form: str = "text"):
    """vLLM's LoggingConfig, for an engine, which hands it on to its processes. `form`: "text", or "json" (an object a line)."""
    from vllm.config.logging import LoggingConfig

    return LoggingConfig(log_level=level.upper(), formatter=form)


def set_up(level: str = "info", form: str = "text") -> None:
    """Called in a replica before vLLM makes anything or NIXL is imported."""
    logging.config._clearExistingHandlers = _forget_names_only
    from vllm.logger import configure_logging_if_needed

    configure_logging_if_needed(config(level, form))
    share_with_ours()


def _forget_names_only() -> None:
    """Takes the place of logging.config's own function, which also closes all existing handlers."""
    logging._handlers.clear()


def share_with_ours() -> None:
    vllm = logging.getLogger("vllm")
    ours = logging.getLogger(OURS)
    ours.handlers, ours.propagate = vllm.handlers, False
    ours.setLevel(vllm.level)


def set_level(level: str) -> None:
    """Change the level while the process runs."""
    vllm = logging.getLogger("vllm")
    for one in (vllm, *vllm.handlers, logging.getLogger(OURS)):
        one.setLevel(level.upper())


class LogLevel:
    """Mixed into vLLM's workers (`worker_extension_cls`)."""

    def set_log_level(self, level: str) -> None:
        set_level(level)
