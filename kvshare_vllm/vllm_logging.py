"""vLLM's logging, set up without closing the log handlers of others, and for our own modules, too: one format, one level.

When its first engine is made, vLLM sets up its logging by `logging.config.dictConfig`, which closes every handler of the
process: Serve's too. A replica whose handlers are closed writes no more to its log file, and fails if Serve asks only then
where that file is, as it does on a busy machine. Set up before, vLLM finds nothing left to do.

Seam: vllm/logger.py (`configure_logging_if_needed`), vllm/config/logging.py; logging.config (`_clearExistingHandlers`);
ray/serve/_private/logging_utils.py
"""

from __future__ import annotations

import logging

#: Our packages; their loggers write where vLLM's does.
OURS = ("kvshare", "kvshare_vllm", "router", "prefill_service", "decode_service", "prefillshare")


def config(level: str = "info", form: str = "text"):
    """vLLM's LoggingConfig, for an engine, which hands it on to its processes. `form`: "text", or "json" (an object a line)."""
    from vllm.config.logging import LoggingConfig

    return LoggingConfig(log_level=level.upper(), formatter=form)


def set_up(level: str = "info", form: str = "text") -> None:
    """Called in a replica before vLLM makes anything."""
    from vllm.logger import configure_logging_if_needed

    handlers = logging._handlerList[:]
    logging._handlerList.clear()
    try:
        configure_logging_if_needed(config(level, form))
    finally:
        logging._handlerList.extend(handlers)
    share_with_ours()


def share_with_ours() -> None:
    vllm = logging.getLogger("vllm")
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = vllm.handlers, False
        logger.setLevel(vllm.level)


def set_level(level: str) -> None:
    """While the process runs."""
    vllm = logging.getLogger("vllm")
    for one in (vllm, *vllm.handlers, *map(logging.getLogger, OURS)):
        one.setLevel(level.upper())


class LogLevel:
    """vLLM's `worker_extension_cls`: what the engine's own processes can be told."""

    def set_log_level(self, level: str) -> None:
        set_level(level)
