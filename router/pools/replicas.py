"""The replicas of one Serve deployment as a router sees them: which there are (members.py), whether they work (wellbeing.py),
which of them may get work, how to call one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import suppress

from prefillshare.kvshare.errors import PrefillShareError, ResumeReason, Unavailable
from prefillshare.kvshare.replica_info import ReplicaStats
from prefillshare.router import clock
from prefillshare.router.background import Background
from prefillshare.router.pools.calls import CALL_ERRORS, Calls, answer
from prefillshare.router.pools.members import Members
from prefillshare.router.pools.own_calls import OwnCalls
from prefillshare.router.pools.questions import Questions
from prefillshare.router.pools.replica import Replica
from prefillshare.router.pools.wellbeing import Wellbeing

logger = logging.getLogger(__name__)

ADAPTERS_S = 0.1
STATS_S = 1.0


class ReplicaSet:
    """`wedged_after_s`: see Wellbeing."""

    def __init__(self, name: str, handle, wedged_after_s: float, background: Background | None = None):
        self.name, self.calls = name, Calls(handle)
        self._questions = Questions(name, background or Background())
        self.joined = Members(name, self.calls, self._questions, self.note_change)
        self.wellbeing = Wellbeing(name, self.calls, self._questions, self.members, wedged_after_s, self.note_change)
        self._changed = asyncio.Event()
        #: Counts changes of who may get work; `on_change` is told of each.
        self.changes = 0
        self._usable: tuple[int, list[Replica]] = (-1, [])
        self.on_change: Callable[[], None] = lambda: None
        self._task: asyncio.Task | None = None

    @property
    def members(self) -> dict[str, Replica]:
        """By id."""
        return self.joined.replicas

    def usable(self, without: Collection[str] = ()) -> list[Replica]:
        """Replicas that may get work; those in `without` only if there is no other. If all are ejected, those that at least
        answer: a pool that refuses everything helps nobody."""
        if self._usable[0] != self.changes:
            replicas = self.members.values()
            answering = [r for r in replicas if r.health.reason is not ResumeReason.WEDGED]
            self._usable = (self.changes, [r for r in replicas if r.health.usable] or answering)
        usable = self._usable[1]
        return [r for r in usable if r.id not in without] or usable if without else usable

    def any_well(self, without: Collection[str]) -> bool:
        """There is a replica that is not ejected and not in `without`."""
        return any(r.health.usable and r.id not in without for r in self.usable())

    def note_change(self) -> None:
        self.changes += 1
        self._changed.set()
        self.on_change()

    async def wait_usable(self) -> None:
        """Wait until a replica may get work. Only the caller's deadline limits this."""
        while not self.usable():
            self._changed.clear()
            await self._changed.wait()

    async def start(self, timeout_s: float) -> None:
        """Wait for the first replica: all deployments of an application start at once."""
        self.calls.start()
        self.joined.start()
        self._task = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_usable()
        except TimeoutError:
            raise Unavailable(f"no replica of {self.name} has started within {timeout_s:g} s") from None

    async def stop(self) -> None:
        self.joined.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._questions.stop()

    async def _watch(self) -> None:
        next_s = 0.0
        while True:
            self.joined.told.clear()
            if is_time := clock.now() >= next_s:
                next_s = clock.now() + STATS_S
            try:
                await self.joined.reconcile()
                if is_time:
                    self.wellbeing.ask()
            except Exception:
                logger.exception("watching replicas of %s", self.name)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, next_s - clock.now())):
                    await self.joined.told.wait()

    def on(self, replica: str) -> OwnCalls:
        """Calls that go to this replica."""
        return self.calls.on(replica)

    def streaming_on(self, replica: str) -> OwnCalls:
        return self.calls.streaming_on(replica)

    def succeeded(self, replica_id: str) -> None:
        self.wellbeing.succeeded(replica_id)

    def failed(self, replica_id: str, reason: ResumeReason) -> None:
        """A call on this replica failed, and not because of the request."""
        self.wellbeing.failed(replica_id, reason)

    async def stats_now(self) -> dict[str, ReplicaStats]:
        """Current figures of each replica; replicas that do not answer within STATS_S are left out."""

        async def ask(replica: str) -> ReplicaStats | None:
            try:
                async with asyncio.timeout(STATS_S):
                    return await answer(self.calls.on(replica).stats.remote())
            except (*CALL_ERRORS, PrefillShareError, TimeoutError):
                return None

        replicas = list(self.members)
        told = zip(replicas, await asyncio.gather(*map(ask, replicas)), strict=True)
        return {replica: stats for replica, stats in told if stats is not None}

    async def adapter_problems(self, names: Collection[str], timeout_s: float, replicas: int = 1) -> dict[str, str]:
        """Those of the adapters `names` that some replica cannot serve -> the reason.

        Waits until at least `replicas` replicas answer, and each that answers has loaded all adapters or has failed to. An
        adapter with which some replica has done neither after `timeout_s` is a problem, too. (While a replica is taking over a
        change, Serve reports it as gone.)
        """

        async def ask(replica: str) -> dict[str, str] | None:
            try:
                async with asyncio.timeout(self.wellbeing.wedged_after_s):
                    return await answer(self.calls.on(replica).adapters.remote())
            except (*CALL_ERRORS, PrefillShareError, TimeoutError):
                return None  # such a replica gets no turns, or soon will not

        until = clock.now() + timeout_s
        while True:
            told = [states for states in await asyncio.gather(*map(ask, list(self.members))) if states is not None]
            late = [name for name in names if any(name not in states for states in told)]
            if (not late and len(told) >= replicas) or clock.now() > until:
                failed = {name: why for states in told for name, why in states.items() if why and name in names}
                return failed | dict.fromkeys(late, f"it is not loaded after {timeout_s:g} s")
            await asyncio.sleep(ADAPTERS_S)
