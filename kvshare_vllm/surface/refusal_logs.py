"""Refusals of requests leave nothing in the router's log. vLLM's routes and streams log each with a traceback of some 60 lines,
so that one tenant's wrong requests could fill it; failures of ours are logged as before. Nor does what is asked and answered,
which vLLM logs at the level debug.

Seam: vllm/entrypoints (what routes and streams log with `logger.exception` and `logger.debug`), create_error_response

Goes when: vLLM logs refusals without a traceback, and no messages.
"""

from __future__ import annotations

import logging

from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

#: vLLM's modules that log what they then answer with.
MODULES = (
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.anthropic.serving",
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.completion.serving",
)


def leave_out_refusals() -> None:
    """Called once per process or more often."""
    for name in MODULES:
        logging.getLogger(name).addFilter(_may_be_logged)


def _may_be_logged(record: logging.LogRecord) -> bool:
    if record.levelno <= logging.DEBUG:
        return False
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, Exception) or create_error_response(error).error.code >= 500
