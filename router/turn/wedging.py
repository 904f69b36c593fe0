"""A turn that may be what stopped an engine is not given to the next one.

Only a response's format can stop an engine, which compiles it and uses it at every step. Formats are tried beforehand
(kvshare_vllm/grammars/grammars.py); this is for those that pass and are harmful nevertheless. A turn without a format cannot
stop an engine, and goes on elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefillshare.kvshare.errors import InvalidInput, PrefixLost, ReplicaLost, ResumeReason

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn


class NoToken(PrefixLost):
    """A decode call gave no first token in time: the KV did not come, or the engine does not step."""


def check_may_go_on(turn: Turn, lost: PrefixLost | ReplicaLost) -> None:
    """Raises InvalidInput, after which clients do not retry by themselves, for a turn with a format if an engine stopped before
    it gave the turn a token, or if a second engine gave it none in time."""
    if getattr(turn.call.sampling, "structured_outputs", None) is None or not turn.is_silent:
        return
    if lost.reason is ResumeReason.WEDGED or (isinstance(lost, NoToken) and turn.failures):
        raise InvalidInput(
            f"a replica stopped before the first token of this response, and its format may be why: {lost.message}",
            field="response_format",
            fix="leave out the format of the response, or send a simpler one",
        ) from lost
