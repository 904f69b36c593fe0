"""Keeps what Ray has to say out of the output of a process that starts or joins a cluster: its log lines, and the messages that
it would print, go to a file beside the records of deployments.

Seam: ray/_private/worker.py (`listen_error_messages`, which prints by `print_to_stdstream`), ray/_private/log.py and
ray/serve/_private/logging_utils.py (the handlers that Ray gives its loggers "ray" and "ray.serve")
"""

from __future__ import annotations

import logging
from logging.handlers import RotatingFileHandler
from typing import Any

from prefillshare import records

NAME = "ray.log"
MOST_BYTES = 1 << 20
FORM = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"

logger = logging.getLogger("ray")

#: Messages about calls to Serve's controller, which Ray repeats by itself. A controller that stops or restarts causes many.
_EXPECTED = "Task ServeController."


def to_file() -> None:
    """May be called several times."""
    from ray import serve  # noqa: F401 - it gives its logger a handler when it is imported
    from ray._private import worker

    worker.print_to_stdstream = _log
    if any(isinstance(handler, _RaysFile) for handler in logger.handlers):
        return
    file = _RaysFile(records.folder() / NAME, maxBytes=MOST_BYTES, backupCount=1, delay=True)
    file.setFormatter(logging.Formatter(FORM))
    logger.handlers[:], logger.propagate = [file], False
    of_serve = logging.getLogger("ray.serve")
    of_serve.handlers.clear()
    of_serve.propagate = True


class _RaysFile(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that is full must not fill the output."""


def _log(message: dict[str, Any], ignore_prefix: bool = False) -> None:
    for line in message["lines"]:
        logger.log(logging.DEBUG if line.startswith(_EXPECTED) else logging.WARNING, "%s: %s", message["pid"], line)
