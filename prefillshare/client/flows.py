"""What a call and a turn consist of, step by step, with all that is tried again; without a step being done. The clients do the
steps, each in its own way: they send a step's outcome back into the generator, or throw its error.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from prefillshare.client import calls
from prefillshare.client.results import TurnResult
from prefillshare.client.retries import Call, Retries, Tries
from prefillshare.client.taking import Taking
from prefillshare.kvshare.errors import PrefillShareError

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """Make this call once. Its outcome is the answer."""

    call: Call
    timeout_s: float


@dataclass(frozen=True)
class Collect:
    """Take the turn once. Its outcome is a Collected that has all of its pieces."""

    taking: Taking


@dataclass(frozen=True)
class Pause:
    seconds: float


Steps = Generator[Ask | Collect | Pause, Any, T]


def answered(call: Call, policy: Retries, timeout_s: float) -> Steps[Any]:
    """Returns the call's answer."""
    tries = Tries(policy, timeout_s)
    while True:
        try:
            return (yield Ask(call, tries.left_s))
        except PrefillShareError as error:
            if call.is_done(error, tries):
                return call.done
            pause_s = tries.pause_s(error, call.repeatable)
        yield Pause(pause_s)


def taken(taking: Taking) -> Steps[list[TurnResult]]:
    """Returns all responses of the turn."""
    while True:
        try:
            return (yield Collect(taking)).results()
        except PrefillShareError as error:
            pause_s = taking.pause_s(error)
        yield from before_next(taking, pause_s)


def before_next(taking: Taking, pause_s: float) -> Steps[None]:
    """What comes between two tries of a turn."""
    yield Pause(pause_s)
    if taking.must_look:
        look = calls.get(taking.request.session_id)
        taking.found((yield from answered(look, taking.policy, taking.left_s)).turns)
