"""Faults of every kind, drawn one after the other, some before the last has passed."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from benchmarks.faults.processes import routers, stopped, titled
from benchmarks.faults.strikes import Strikes
from benchmarks.shared.small import GRPC_PORT
from benchmarks.soak.findings import Findings
from benchmarks.soak.system import POOLS, System
from prefillshare.apply import apply
from prefillshare.kvshare.errors import ConfigError, EngineStartError

#: Seconds between the end of a fault and the next one, and the share of faults after which the system may become whole first.
PAUSE_S, WHOLE_SHARE = (1.0, 15.0), 0.8
CUT_S, FULL_S, HANG_S = (0.5, 8.0), (0.5, 5.0), (0.5, 12.0)
#: How often a kind is drawn, if not once.
OFTEN = {"cut link": 3, "fill disk": 2, "hang up": 2, "kill raylet": 0.5, "kill controller": 0.5}


class Storm(Strikes):
    """`cut(seconds)`: cuts the link between the hosts for so long; None: there is none. `disk`: folder of a small file system
    on which Redis writes; None: there is none to fill."""

    def __init__(
        self,
        system: System,
        rng: random.Random,
        found: Findings,
        log: Callable[[str], None],
        cut: Callable[[float], None] | None,
        disk: Path | None,
    ):
        super().__init__(system.handle, system.nodes, system.redis, log, POOLS)
        self._system, self._rng, self._found = system, rng, found
        self.kinds["hang router"] = lambda kind: self._hang(routers(GRPC_PORT)[:1])
        self.kinds["hang controller"] = lambda kind: self._hang(titled("ray::ServeController"))
        self.kinds["apply"] = self._apply
        if cut:
            self.kinds["cut link"] = lambda kind: cut(self._rng.uniform(*CUT_S))
        if disk:
            self.kinds["fill disk"] = partial(self._fill, disk)
        self._more_runs = False

    def _run(self) -> None:
        kinds = sorted(self.kinds)
        while not self._stop.wait(self._rng.uniform(*PAUSE_S)):
            kind = self._rng.choices(kinds, [OFTEN.get(one, 1) for one in kinds])[0]
            waits = self._rng.random() < WHOLE_SHARE
            if waits:
                self._until(self.whole)
            if self._stop.is_set():
                break
            try:
                self._strike(kind)
                self._found.count(self._found.faults, kind)
            except Exception as error:  # its victim was gone already
                self._log(f"[dim]{kind}: {type(error).__name__}[/]")

    def calm(self, limit_s: float) -> bool:
        """Everything is whole again within so many seconds, with the decoders that are always there."""
        if self._more_runs:
            self._apply("apply")
        return self._until(self.whole, limit_s)

    def _hang(self, victims: list[psutil.Process]) -> None:
        with stopped(victims):
            self._stop.wait(self._rng.uniform(*HANG_S))

    def _apply(self, kind: str) -> None:
        """Add a decoder while turns run, or take it away."""
        self._until(self.whole)
        with suppress(EngineStartError, ConfigError):
            apply(self._system.deployment if self._more_runs else self._system.more)
            self._more_runs = not self._more_runs

    def _fill(self, disk: Path, kind: str) -> None:
        """Redis cannot write for a while."""
        ballast = disk / "ballast"
        try:
            with suppress(OSError), ballast.open("wb") as out:
                while True:
                    out.write(bytes(1 << 16))
                    out.flush()
            self._stop.wait(self._rng.uniform(*FULL_S))
        finally:
            ballast.unlink(missing_ok=True)
