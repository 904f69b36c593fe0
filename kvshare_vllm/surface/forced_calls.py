"""A call that `tool_choice` forces is the whole answer, in which nothing is left to constrain: vLLM drops what
`structured_outputs` asks for. OpenAI's and Anthropic's formats are of an answer's text; a forced call has none, so they ask for
nothing then, and agent frameworks send them with every call.

Seam: vllm/parser/abstract_parser.py (DelegatingParser._apply_structural_tag)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefillshare.kvshare.errors import InvalidInput

#: Types of a `tool_choice` that forces a call: OpenAI's and Anthropic's.
_FORCING = ("function", "custom", "any", "tool")


def check_format_beside_forced_call(asked: Mapping[str, Any]) -> None:
    """`asked`: a request's fields, of any surface, as its client sent them. Raises InvalidInput."""
    choice = asked.get("tool_choice")
    if not asked.get("tools") or not (choice == "required" or _of(choice, "type") in _FORCING):
        return
    for kind, form in _fields(asked.get("structured_outputs")).items():
        if form is not None and form is not False:
            fix = "leave it out, or let the model choose whether it calls a tool"
            field = f"structured_outputs.{kind}"
            raise InvalidInput("the call that tool_choice forces leaves no room for a format", field=field, fix=fix)


def _fields(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def _of(given: Any, field: str) -> Any:
    return _fields(given).get(field)
