"""vLLM's refusals of a request, as our own errors, in words that fit this server.

Seam: vllm/exceptions.py, whose errors are no ValueErrors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.exceptions import GracefulHTTPError, VLLMClientError

from prefillshare.kvshare.errors import InvalidInput, Overloaded

#: Pattern of vLLM's advice on how to start its own server -> what that means here.
_SETTINGS = (
    (re.compile(r"tool.*--tool-call-parser"), "tools need base.tool_call_parser, which this deployment does not set"),
)
#: What only a text about vLLM's own server has in it.
_OWN = re.compile(r"\bVLLM_[A-Z]|(?<![\w-])--[a-z]|\bvLLM (engine|server|was|has|is|does)\b")
_REPEATED = re.compile(r"\s*\((?:parameter|value)=[^()]*\)\s*$")


@contextmanager
def as_our_errors() -> Iterator[None]:
    """Raises InvalidInput, with vLLM's parameter, for what vLLM refuses as wrong; Overloaded for what it has no room for."""
    try:
        yield
    except VLLMClientError as error:
        text = str(error.args[0] if error.args else error)  # str(error) repeats the parameter
        raise InvalidInput(for_clients(text), field=getattr(error, "parameter", None)) from error
    except GracefulHTTPError as error:
        raise Overloaded(error.message, fix="try again") from error


def for_clients(message: str) -> str:
    """vLLM's text without what it says of vLLM's own server and how to start it, and without a repetition of `param`."""
    for pattern, meaning in _SETTINGS:
        if pattern.search(message):
            return meaning
    sentences = re.split(r"(?<=[.!?;])\s+", _REPEATED.sub("", message))
    kept = " ".join(sentence for sentence in sentences if not _OWN.search(sentence))
    return kept or "this deployment does not serve what the request asks for"
