"""Sends Ray's messages to a process that started or joined a cluster to the log instead of standard output.

Seam: ray/_private/worker.py (`listen_error_messages`, which prints by `print_to_stdstream`)
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

#: Messages about calls to Serve's controller, which Ray repeats by itself. A controller that stops or restarts causes many.
_EXPECTED = "Task ServeController."


def log_instead_of_printing() -> None:
    """May be called several times."""
    from ray._private import worker

    worker.print_to_stdstream = _log


def _log(message: dict[str, Any], ignore_prefix: bool = False) -> None:
    for line in message["lines"]:
        logger.log(logging.DEBUG if line.startswith(_EXPECTED) else logging.WARNING, "%s: %s", message["pid"], line)
