"""Tool calls that wait for a result: a result without its call is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefillshare.kvshare.errors import InvalidInput

#: Most calls whose ids a session has. Where there are more, it is not known which ones wait.
MOST_CALLS = 256


def left_unanswered(
    before: Sequence[str] | None, messages: Sequence[Mapping[str, Any]], field: str | None = None
) -> tuple[str, ...] | None:
    """Ids of the calls that wait for a result behind these messages; None: not known. `before`: those before them. A result
    that names no call answers none. `field`: that of the messages; if it is given, a result that names a call nobody made
    raises InvalidInput."""
    waiting = None if before is None else list(before)
    for number, message in enumerate(messages):
        answers = message.get("tool_call_id")
        if answers and waiting is not None:
            if answers in waiting:
                waiting.remove(answers)
            elif field:
                raise InvalidInput(
                    f"no call {str(answers)[:64]!r} waits for a result",
                    field=f"{field}.{number}.tool_call_id",
                    fix="use the id of a call that was made before, once",
                )
        if waiting is not None:
            waiting += [str(call.get("id") or "") for call in message.get("tool_calls") or ()]
    return None if waiting is None or len(waiting) > MOST_CALLS else tuple(waiting)
