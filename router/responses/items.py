"""Items of responses and conversations as clients see them: each with an id, in lists that are read page by page."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from prefillshare.kvshare.errors import InvalidInput, NotFound

Item = dict[str, Any]

_STATUSES = ("in_progress", "completed", "incomplete")
MOST_ID_CHARS = 256
MOST_PER_PAGE, USUAL_PER_PAGE = 100, 20
#: Beginning of an id, by the item's type (OpenAI's).
_PREFIXES = {"message": "msg", "function_call": "fc", "reasoning": "rs", "custom_tool_call": "ctc"}


def items_of(given: str | Sequence[Any], field: str) -> list[Item]:
    """A response's `input` as items with ids. Raises InvalidInput for an id or a status that is none."""
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    items = [item if isinstance(item, dict) else item.model_dump(mode="json", exclude_none=True) for item in given]
    return [_with_id(item, f"{field}.{number}") for number, item in enumerate(items)]


def _with_id(item: Item, field: str) -> Item:
    kind, named, status = item.get("type") or "message", item.get("id"), item.get("status") or "completed"
    if named is not None and not (isinstance(named, str) and 0 < len(named) <= MOST_ID_CHARS):
        fix = f"leave it out, or give a text of at most {MOST_ID_CHARS} characters"
        raise InvalidInput("this is no id", field=f"{field}.id", fix=fix)
    if status not in _STATUSES:
        raise InvalidInput(
            f"unknown status {str(status)[:64]!r}", field=f"{field}.status", fix=f"use one of {', '.join(_STATUSES)}"
        )
    named = named or f"{_PREFIXES.get(kind, 'item')}_{uuid.uuid4().hex}"
    return {"type": kind, **item, "id": named, "status": status}


def unanswered(before: Sequence[str], items: Sequence[Item], field: str) -> list[str]:
    """Ids of the function calls that no output answers, after these items. `before`: those before them.
    Raises InvalidInput for an output without its call."""
    calls = list(before)
    for number, item in enumerate(items):
        kind, call_id = item["type"], item.get("call_id")
        if kind in ("function_call", "custom_tool_call"):
            calls.append(call_id)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            if call_id not in calls:
                raise InvalidInput(
                    f"no call {call_id!r} waits for an output",
                    field=f"{field}.{number}.call_id",
                    fix="send the call_id of a function call that has been made before, once",
                )
            calls.remove(call_id)
    return calls


def page(items: Sequence[Item], *, after: str | None, limit: int, order: str) -> dict[str, Any]:
    """A list as OpenAI's API pages it. `items`: all of them, oldest first. Raises InvalidInput, NotFound."""
    if not 1 <= limit <= MOST_PER_PAGE:
        raise InvalidInput(f"{limit} is out of range", field="limit", fix=f"use 1 to {MOST_PER_PAGE}")
    if order not in ("asc", "desc"):
        raise InvalidInput(f"unknown order {order!r}", field="order", fix="use asc or desc")
    listed = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        place = next((number for number, item in enumerate(listed) if item["id"] == after), None)
        if place is None:
            raise NotFound(f"no item {after!r} is in the list", field="after", fix="use the last_id of the page before")
        listed = listed[place + 1 :]
    shown = listed[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(listed) > limit,
    }
