"""A call that `tool_choice` forces leaves no room for a format of the response. vLLM drops the format, or refuses both without
saying which field it means.

Seam: vllm/parser/abstract_parser.py (DelegatingParser._apply_structural_tag)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefillshare.kvshare.errors import InvalidInput

#: Types of a `tool_choice` that forces a call: OpenAI's and Anthropic's.
_FORCING = ("function", "custom", "any", "tool")
#: Where a format may stand: field -> field within it.
_FORMATS = {"response_format": "", "text": "format", "output_config": "format"}


def check_format_beside_forced_call(asked: Mapping[str, Any]) -> None:
    """`asked`: a request's fields, of any surface, as its client sent them. Raises InvalidInput."""
    choice = asked.get("tool_choice")
    if not asked.get("tools") or not (choice == "required" or _of(choice, "type") in _FORCING):
        return
    formats = {f"structured_outputs.{kind}": form for kind, form in _fields(asked.get("structured_outputs")).items()}
    for field, inner in _FORMATS.items():
        form = _of(asked.get(field), inner) if inner else asked.get(field)
        formats[f"{field}.{inner}".rstrip(".")] = None if _of(form, "type") == "text" else form
    for field, form in formats.items():
        if form is not None and form is not False:
            fix = "leave it out, or let the model choose whether it calls a tool"
            raise InvalidInput("the call that tool_choice forces leaves no room for a format", field=field, fix=fix)


def _fields(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def _of(given: Any, field: str) -> Any:
    return _fields(given).get(field)
