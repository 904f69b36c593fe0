"""The interface between the frontend and the turn runner: the call, and the turn that runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from vllm.sampling_params import SamplingParams

from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare.usage import TurnUsage


@dataclass(frozen=True)
class TurnCall:
    """One response to one prompt."""

    decoder: str
    prompt: list[int]
    sampling: SamplingParams
    request_id: str
    caller: Caller
    #: The client's own cache salt.
    salt: str | None = None
    #: How the turn is to be run, apart from what it asks for: the runner's own object, as passed to `Frontend.run`.
    terms: Any = None


class RunningTurn(Protocol):
    """A turn that has not ended. `usage` is filled while it runs."""

    usage: TurnUsage

    def chunks(self) -> AsyncIterator[TokenChunk]:
        """The turn's tokens; called once. Closing the iterator ends the turn everywhere. Raises PrefillShareError."""

    def text_has_ended(self) -> None:
        """The response is complete although the engine would go on: a stop text was met."""


#: Raises NotFound, InvalidInput or Unavailable before anything is done for the turn.
TurnRunner = Callable[[TurnCall], RunningTurn]
