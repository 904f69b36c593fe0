"""vLLM's refusals of a request, as our own errors.

Seam: vllm/exceptions.py, whose errors are no ValueErrors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.exceptions import GracefulHTTPError, VLLMClientError

from prefillshare.kvshare.errors import InvalidInput, Overloaded


@contextmanager
def as_our_errors() -> Iterator[None]:
    """Raises InvalidInput, with vLLM's parameter, for what vLLM refuses as wrong; Overloaded for what it has no room for."""
    try:
        yield
    except VLLMClientError as error:
        text = str(error.args[0] if error.args else error)  # str(error) repeats the parameter
        raise InvalidInput(text, field=getattr(error, "parameter", None)) from error
    except GracefulHTTPError as error:
        raise Overloaded(error.message, fix="try again") from error
