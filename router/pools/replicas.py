"""The replicas of one Serve deployment as a router sees them: who is there, how they fare, how to call one.

1. Serve pushes who runs (router/pools/pinned.py); a newcomer is asked to describe itself and joins.
2. Every STATS_S each is asked how it fares. One whose engine has died is ejected; one that does not answer, or whose
   engine does not step, is wedged.
3. Calls on a wedged replica end at once, as ReplicaLost: the turn goes on elsewhere. One that has died fails its
   calls itself; one that is being stopped finishes them.
4. An ejected replica is probed now and then, and used again when it has generated a token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from prefillshare.kvshare.errors import PrefillShareError, ReplicaLost, ResumeReason, Unavailable
from prefillshare.kvshare.replica_info import ReplicaInfo, ReplicaStats
from prefillshare.router.background import Background
from prefillshare.router.pools.health import Health
from prefillshare.router.pools.own_calls import OwnCalls
from prefillshare.router.pools.pinned import MEMBERS, WATCHERS

logger = logging.getLogger(__name__)

#: How a call to a replica fails for the replica's sake: its process, Serve, or the transport between.
CALL_ERRORS = (RayError, RayServeException, grpc.aio.AioRpcError)

ADAPTERS_S = 0.1
STATS_S = 1.0
ANSWER_S = 30.0


@dataclass
class Replica:
    """One replica and this router's work on it."""

    info: ReplicaInfo
    health: Health
    stats: ReplicaStats = field(default_factory=ReplicaStats)
    #: This router's calls and uncomputed prompt tokens there.
    active: int = 0
    queued_tokens: int = 0
    #: Other routers', as the replica last told.
    others_active: int = 0
    others_queued_tokens: int = 0
    #: See Candidate.filled_tokens.
    filled_tokens: float = 0.0
    calls: set[asyncio.Timeout] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.id = self.info.replica

    @property
    def total_active(self) -> int:
        """Calls of all routers."""
        return self.active + self.others_active

    @property
    def total_queued_tokens(self) -> int:
        return self.queued_tokens + self.others_queued_tokens

    @property
    def load(self) -> tuple[int, float]:
        load = self.active + self.others_active + self.queued_tokens + self.others_queued_tokens
        return load, self.filled_tokens

    def told(self, stats: ReplicaStats, active: int, queued_tokens: int) -> None:
        """What it told, and what of that was this router's when it was asked."""
        self.stats = stats
        self.others_active = max(0, stats.active - active)
        self.others_queued_tokens = max(0, stats.queued_tokens - queued_tokens)

    def end_calls(self) -> None:
        now = asyncio.get_running_loop().time()
        for scope in self.calls:
            if scope.when() is None:  # else it is ending already
                scope.reschedule(now)


#: Told of a replica that has joined, with what it is, or left (None).
Listener = Callable[[str, ReplicaInfo | None], Awaitable[None]]


class ReplicaSet:
    """`wedged_after_s`: how long a replica may leave a question unanswered, or an engine calls without a step."""

    def __init__(self, name: str, handle, wedged_after_s: float, background: Background | None = None):
        self.name = name
        self._app_handle = handle
        self._handle = handle.options(_by_reference=False)
        self._streams = handle.options(stream=True, _by_reference=False)
        self._wedged_after_s, self._background = wedged_after_s, background or Background()
        self.listener: Listener | None = None
        self._replicas: dict[str, Replica] = {}
        self._asking: dict[str, asyncio.Task] = {}
        self._changed = asyncio.Event()
        #: Somebody has come or gone, or has been asked what it is.
        self._members_changed = asyncio.Event()
        #: Counts changes of who may get work; `on_change` is told of each.
        self.changes = 0
        self._usable: tuple[int, list[Replica]] = (-1, [])
        self.on_change: Callable[[], None] = lambda: None
        self._task: asyncio.Task | None = None
        self._watcher: Callable[[], None] | None = None

    # Who is there ---------------------------------------------------------------------------------------------------

    @property
    def members(self) -> dict[str, Replica]:
        return self._replicas

    def usable(self, without: Collection[str] = ()) -> list[Replica]:
        """Replicas that may get work; those in `without` only if there is no other. Where all are ejected, those that
        at least answer: a pool that refuses everything helps nobody."""
        if self._usable[0] != self.changes:
            replicas = self._replicas.values()
            answering = [r for r in replicas if r.health.reason is not ResumeReason.WEDGED]
            self._usable = (self.changes, [r for r in replicas if r.health.usable] or answering)
        usable = self._usable[1]
        return [r for r in usable if r.id not in without] or usable if without else usable

    def _note_change(self) -> None:
        self.changes += 1
        self._changed.set()
        self.on_change()

    async def wait_usable(self) -> None:
        """Until a replica may get work. The caller's deadline bounds it."""
        while not self.usable():
            self._changed.clear()
            await self._changed.wait()

    async def start(self, timeout_s: float) -> None:
        """Wait for the first replica: all deployments of an application start at once."""
        if not self._app_handle.is_initialized:
            self._app_handle._init()
        for handle in (self._handle, self._streams):
            if not handle.is_initialized:
                handle._init()
        self._watch_members()
        self._task = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_usable()
        except TimeoutError:
            raise Unavailable(f"no replica of {self.name} has started within {timeout_s:g} s") from None

    @property
    def _deployment(self) -> tuple[str, str]:
        deployment = self._app_handle.deployment_id
        return deployment.app_name, deployment.name

    def _watch_members(self) -> None:
        loop = asyncio.get_running_loop()
        WATCHERS[self._deployment] = self._watcher = lambda: loop.call_soon_threadsafe(self._members_changed.set)

    async def stop(self) -> None:
        if self._watcher and WATCHERS.get(self._deployment) is self._watcher:
            del WATCHERS[self._deployment]
        tasks = [t for t in (self._task, *self._asking.values()) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        next_s = 0.0
        while True:
            self._members_changed.clear()
            if is_time := time.monotonic() >= next_s:
                next_s = time.monotonic() + STATS_S
            try:
                await self._reconcile()
                if is_time:
                    self._look_after()
            except Exception:
                logger.exception("watching replicas of %s", self.name)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, next_s - time.monotonic())):
                    await self._members_changed.wait()

    async def _reconcile(self) -> None:
        there = MEMBERS.get(self._deployment, frozenset())
        for replica in self._replicas.keys() - there:
            await self._leave(replica)
        for replica in there - self._replicas.keys():
            self._ask(f"join {replica}", self._join(replica))

    async def _join(self, replica: str) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                info = await answer(self.on(replica).describe.remote())
            if self.listener:
                await self.listener(replica, info)
            self._replicas[replica] = Replica(info, Health())
            logger.info("replica %s of %s has joined", replica, self.name)
            self._note_change()
            self._members_changed.set()  # it may have gone meanwhile
        except (*CALL_ERRORS, PrefillShareError, TimeoutError) as error:
            logger.warning("replica %s of %s does not say what it is: %s", replica, self.name, error)

    async def _leave(self, replica: str) -> None:
        del self._replicas[replica]
        logger.info("replica %s of %s has left", replica, self.name)
        self._note_change()
        if self.listener:
            await self.listener(replica, None)

    # How they fare --------------------------------------------------------------------------------------------------

    def _look_after(self) -> None:
        for replica in self._replicas.values():
            self._ask(f"stats {replica.id}", self._ask_stats(replica))
            if replica.health.probe_due:
                self._ask(f"probe {replica.id}", self._probe(replica))

    def _ask(self, what: str, question) -> None:
        """One question of a kind at a time; `_asking` owns its task."""
        if what in self._asking:
            question.close()
            return
        task = self._asking[what] = self._background.start("replica_question", question, pool=self.name, question=what)
        task.add_done_callback(lambda _: self._asking.pop(what, None))

    async def _ask_stats(self, replica: Replica) -> None:
        active, queued_tokens = replica.active, replica.queued_tokens
        try:
            async with asyncio.timeout(self._wedged_after_s):
                stats = await answer(self.on(replica.id).stats.remote())
            replica.told(stats, active, queued_tokens)
            if stats.stalled_s > self._wedged_after_s:
                self.failed(replica.id, ResumeReason.WEDGED)
        except TimeoutError:
            self.failed(replica.id, ResumeReason.WEDGED)
        except Unavailable:
            self.failed(replica.id, ResumeReason.GONE, for_good=True)
        except (*CALL_ERRORS, PrefillShareError) as error:
            logger.warning("replica %s of %s does not say how it fares: %s", replica.id, self.name, error)

    async def stats_now(self) -> dict[str, ReplicaStats]:
        """How each fares, asked for now; those that do not answer within STATS_S are left out."""

        async def ask(replica: str) -> ReplicaStats | None:
            try:
                async with asyncio.timeout(STATS_S):
                    return await answer(self.on(replica).stats.remote())
            except (*CALL_ERRORS, PrefillShareError, TimeoutError):
                return None

        replicas = list(self._replicas)
        told = zip(replicas, await asyncio.gather(*map(ask, replicas)), strict=True)
        return {replica: stats for replica, stats in told if stats is not None}

    async def adapter_problems(self, names: Collection[str], timeout_s: float, replicas: int = 1) -> dict[str, str]:
        """Of these adapters, those that some replica cannot serve, and why. Waits until so many replicas answer, and each that
        answers has loaded them or has failed to; what some has done neither with after `timeout_s` is a problem, too. (Serve
        tells of a replica that is taking over a change as if it were gone.)"""

        async def ask(replica: str) -> dict[str, str] | None:
            try:
                async with asyncio.timeout(self._wedged_after_s):
                    return await answer(self.on(replica).adapters.remote())
            except (*CALL_ERRORS, PrefillShareError, TimeoutError):
                return None  # it gets no turns, or is about to

        until = time.monotonic() + timeout_s
        while True:
            told = [states for states in await asyncio.gather(*map(ask, list(self._replicas))) if states is not None]
            late = [name for name in names if any(name not in states for states in told)]
            if (not late and len(told) >= replicas) or time.monotonic() > until:
                failed = {name: why for states in told for name, why in states.items() if why and name in names}
                return failed | dict.fromkeys(late, f"it is not loaded after {timeout_s:g} s")
            await asyncio.sleep(ADAPTERS_S)

    async def _probe(self, replica: Replica) -> None:
        well = False
        try:
            async with asyncio.timeout(self._wedged_after_s):
                await answer(self.on(replica.id).probe.remote())
            well = True
            logger.info("replica %s of %s is let back in", replica.id, self.name)
        except TimeoutError:
            self.failed(replica.id, ResumeReason.WEDGED)
        except (*CALL_ERRORS, PrefillShareError) as error:
            logger.warning("replica %s of %s stays out: %s: %s", replica.id, self.name, type(error).__name__, error)
        finally:
            replica.health.probed(well)
        if well:
            self._note_change()

    def succeeded(self, replica_id: str) -> None:
        if replica := self._replicas.get(replica_id):
            replica.health.succeeded()

    def failed(self, replica_id: str, reason: ResumeReason, *, for_good: bool = False) -> None:
        """A call on this replica failed, and not through the fault of what it was asked. `for_good`: so will the next."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        ejected, hangs = replica.health.failed(reason, for_good=for_good), reason is ResumeReason.WEDGED
        if ejected:
            logger.warning("replica %s of %s is ejected: %s", replica_id, self.name, reason.value)
        if ejected or hangs:
            self._note_change()
        if hangs:
            replica.end_calls()

    # Calls ----------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def using(self, replica: Replica, queued_tokens: int = 0) -> AsyncIterator[None]:
        """Count a call as load. Raises ReplicaLost if the replica is found wedged meanwhile."""
        replica.active += 1
        replica.queued_tokens += queued_tokens
        scope = asyncio.timeout(None)
        try:
            async with scope:
                replica.calls.add(scope)
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise ReplicaLost(f"replica {replica.id} does not answer", reason=ResumeReason.WEDGED, fix="try again") from None
        finally:
            replica.calls.discard(scope)
            replica.active -= 1
            replica.queued_tokens -= queued_tokens

    def on(self, replica: str) -> OwnCalls:
        """Calls that go to this replica."""
        return OwnCalls(self._handle.options(session_id=replica))

    def streaming_on(self, replica: str) -> OwnCalls:
        return OwnCalls(self._streams.options(session_id=replica))


async def answer(response):
    """What a replica answers; a call nobody waits for any more is taken back."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
