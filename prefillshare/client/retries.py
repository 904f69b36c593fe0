"""When a call is tried again, and after which pause: only where it was not done, or where doing it twice is like doing it once.

| what failed | tried again |
| --- | --- |
| refused for lack of room (Overloaded), or no connection | every call: nothing has been done |
| the connection broke, or the server is unavailable | what only reads; what leads to the same if it was done already |
| the same, during a turn | if the session shows that the turn was not committed; the server checks that again |
| anything else | never |
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

from prefillshare.client import settings
from prefillshare.client.failures import was_not_sent
from prefillshare.kvshare import errors


@dataclass(frozen=True)
class Retries:
    """`most`: further tries of a call. The pause before a try is at least the server's hint; else it doubles from
    `first_pause_s` on up to `longest_pause_s`, and is cut at random, so that clients do not come back all at once. A call whose
    hint is longer than `longest_pause_s`, or whose pause would outlast its deadline, fails at once."""

    most: int = 3
    first_pause_s: float = 0.25
    longest_pause_s: float = 30.0

    def __post_init__(self):
        settings.count(self.most, "retries.most")
        settings.seconds(self.first_pause_s, "retries.first_pause_s", or_none_at_all=True)
        settings.seconds(self.longest_pause_s, "retries.longest_pause_s", or_none_at_all=True)

    def pause_s(self, number: int, hint_s: float = 0.0) -> float | None:
        """Seconds before further try `number`, from 0; None: no further one."""
        if number >= self.most or hint_s > self.longest_pause_s:
            return None
        usual_s = min(self.longest_pause_s, self.first_pause_s * 2.0**number) * random.uniform(0.5, 1.0)
        return max(usual_s, hint_s * random.uniform(1.0, 1.25))


#: Of a client that is told not to retry.
NONE = Retries(most=0)


class Tries:
    """The tries of one call, within `timeout_s` altogether."""

    def __init__(self, policy: Retries, timeout_s: float):
        self._policy, self._ends, self._number = policy, time.monotonic() + timeout_s, 0
        #: A try has failed of which it is not known whether it was done.
        self.is_uncertain = False

    @property
    def left_s(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def pause_s(self, error: errors.PrefillShareError, repeatable: bool, *, counts: bool = True) -> float:
        """Seconds before the next try. Raises the error if there is none. `counts`: the next try is one of the policy's."""
        refused = isinstance(error, errors.Overloaded) or was_not_sent(error.__cause__)
        if not refused:
            self.is_uncertain |= isinstance(error, errors.Unavailable)
            if not (repeatable and (isinstance(error, errors.Unavailable) or not counts)):
                raise error
        pause_s = self._policy.pause_s(self._number if counts else 0, error.retry_after_s)
        self._number += counts
        if pause_s is None or pause_s >= self.left_s:
            raise error
        return pause_s


@dataclass(frozen=True)
class Call:
    """A call of the service. `repeatable`: doing it twice is like doing it once. `done_if`: the error which shows that an
    earlier try had done it, and `done`: what it would have answered."""

    method: str
    request: Any
    repeatable: bool = True
    done_if: type[errors.PrefillShareError] | None = None
    done: Any = None

    def is_done(self, error: errors.PrefillShareError, tries: Tries) -> bool:
        return tries.is_uncertain and self.done_if is not None and isinstance(error, self.done_if)
