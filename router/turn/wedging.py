"""A turn that may be what stopped an engine is not given to the next one.

Only a response's format can do that: engines compile it, and look at it with every step. Formats are tried before
(kvshare_vllm/grammars/grammars.py); this is for what that has not found. A plain turn cannot stop an engine, and goes on
elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefillshare.kvshare.errors import InvalidInput, PrefixLost, ReplicaLost, ResumeReason

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn


class NoToken(PrefixLost):
    """A decode call gave no first token in time: the KV did not come, or the engine does not step."""


def check_may_go_on(turn: Turn, lost: PrefixLost | ReplicaLost) -> None:
    """Raises InvalidInput, which clients do not send again by themselves: for a turn with a format that an engine which stopped
    had given no token, or a second one in time."""
    if getattr(turn.call.sampling, "structured_outputs", None) is None or not turn.is_silent:
        return
    if lost.reason is ResumeReason.WEDGED or (isinstance(lost, NoToken) and turn.failures):
        raise InvalidInput(
            f"a replica stopped before the first token of this response, and its format may be why: {lost.message}",
            field="response_format",
            fix="leave out the format of the response, or send a simpler one",
        ) from lost
