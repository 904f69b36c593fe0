"""What the frontend asks of whoever takes its turns, and what it gets."""

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
    #: The client's own.
    salt: str | None = None
    #: How the turn is to be taken, beside what it asks: the runner's own object, as `Frontend.run` was given it.
    terms: Any = None


class RunningTurn(Protocol):
    """A turn that has not ended. `usage` is filled while it runs."""

    usage: TurnUsage

    def chunks(self) -> AsyncIterator[TokenChunk]:
        """Once. Closing the iterator ends the turn everywhere. Raises PrefillShareError."""

    def text_has_ended(self) -> None:
        """The response is whole, although the engine would go on: a stop text was met."""


#: Raises before anything is done for it: NotFound, InvalidInput, Unavailable.
TurnRunner = Callable[[TurnCall], RunningTurn]
