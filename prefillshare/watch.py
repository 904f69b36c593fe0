"""Watches whether what `prefillshare serve` has started is still there.

Ray Serve restarts what dies: replicas, proxies, its controller. It can also give up, or be ended by somebody else; the command
would then go on as if all were well. A `Watch` asks Serve regularly, in a separate thread, because a question to a cluster that
has died may never be answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from prefillshare.cluster import APP
from prefillshare.kvshare.errors import Unavailable

ASK_S = 1.0
#: Seconds for which Ray may not answer, or Serve may have given up: a controller that has died is back sooner.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Trouble:
    """What is wrong with the application, and for how many seconds it may be so before the application counts as gone."""

    text: str
    patience_s: float


#: Asks Serve; None: the application serves, or Serve is at work on it.
Ask = Callable[[], Trouble | None]


class Watch:
    """Sets `ended` when the application is gone or does not come back. `restart_s`: how long an engine that has died may take
    until it serves again."""

    def __init__(
        self,
        restart_s: float,
        ended: threading.Event,
        ask: Ask | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._ask, self._ended, self._clock = ask or (lambda: _trouble(restart_s)), ended, clock
        self._why = ""
        self._since = clock()
        self._trouble: Trouble | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        threading.Thread(target=self._keep_asking, name="watch-asks", daemon=True).start()  # a question may hang
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raises Unavailable, with the reason, if the application has ended."""
        if self._why:
            raise Unavailable(f"what was started does not serve any more: {self._why}", fix="see Ray's logs; start it again")

    def ask(self) -> None:
        try:
            self._trouble = self._ask()
        except Exception as error:  # Ray has many ways to say that it is gone
            self._trouble = Trouble(f"Ray Serve does not answer: {type(error).__name__}: {error}", PATIENCE_S)
        if self._trouble is None:
            self._since = self._clock()

    def look(self) -> None:
        away_s = self._clock() - self._since
        trouble = self._trouble or Trouble("Ray Serve does not answer", PATIENCE_S)
        if away_s > trouble.patience_s and not self._why:
            self._why = f"{trouble.text} (for {away_s:.0f} s)"
            self._ended.set()

    def _keep_asking(self) -> None:
        while not self._stop.wait(ASK_S):
            self.ask()

    def _run(self) -> None:
        while not self._stop.wait(ASK_S):
            self.look()


def _trouble(restart_s: float) -> Trouble | None:
    from ray import serve

    found = serve.status().applications.get(APP)
    if found is None:
        return Trouble("its application is gone from Ray Serve: somebody has deleted it, or has shut Serve down", 5 * ASK_S)
    state = found.status.value
    if state in ("DEPLOYING", "RUNNING"):
        return None
    parts = [f"{name}: {part.message}" for name, part in found.deployments.items() if part.status.value != "HEALTHY"]
    text = f"its application is {state.lower()}: " + "; ".join(filter(None, [found.message, *parts]))
    return Trouble(text, restart_s if state == "UNHEALTHY" else PATIENCE_S)
