"""vLLM's logging, set up without closing the log handlers of others, and for our own modules, too: one format, one level.

Libraries set up their logging by `logging.config.dictConfig`, which closes every handler of the process: vLLM does when its
first engine is made, NIXL when it is imported. In a replica that would close Serve's handlers. Such a replica writes no more
to its log file, and it cannot tell Serve where that file is: a controller that has died and come back takes the replica for
broken and stops it. So `dictConfig` closes nothing in a replica's process.

Seam: logging.config (`_clearExistingHandlers`); vllm/logger.py (`configure_logging_if_needed`), vllm/config/logging.py;
nixl/logging.py; ray/serve/_private/logging_utils.py (`get_component_logger_file_path`)
"""

from __future__ import annotations

import logging
import logging.config

#: What our loggers' names begin with; they write where vLLM's does.
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
    """In place of logging.config's own, which also closes all handlers that there are."""
    logging._handlers.clear()


def share_with_ours() -> None:
    vllm = logging.getLogger("vllm")
    ours = logging.getLogger(OURS)
    ours.handlers, ours.propagate = vllm.handlers, False
    ours.setLevel(vllm.level)


def set_level(level: str) -> None:
    """While the process runs."""
    vllm = logging.getLogger("vllm")
    for one in (vllm, *vllm.handlers, logging.getLogger(OURS)):
        one.setLevel(level.upper())


class LogLevel:
    """Mixed into vLLM's workers (`worker_extension_cls`)."""

    def set_log_level(self, level: str) -> None:
        set_level(level)
