"""vLLM's logging, set up without closing the log handlers of others.

When its first engine is made, vLLM sets up its logging by `logging.config.dictConfig`, which closes every handler of the
process: Serve's too. A replica whose handlers are closed writes no more to its log file, and fails if Serve asks only then
where that file is, as it does on a busy machine. Set up before, vLLM finds nothing left to do.

Seam: vllm/logger.py (`configure_logging_if_needed`); logging.config (`_clearExistingHandlers`);
ray/serve/_private/logging_utils.py
"""

from __future__ import annotations

import logging


def set_up() -> None:
    """Called in a replica before vLLM makes anything."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    handlers = logging._handlerList[:]
    logging._handlerList.clear()
    try:
        configure_logging_if_needed(LoggingConfig())
    finally:
        logging._handlerList.extend(handlers)
