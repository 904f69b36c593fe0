"""A long campaign over doubles, drawn from a seed: clients with sessions and without, on two routers, while everything fails
that can. Each token is compared with what an undisturbed system says, and each session's context with its history.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from virtual_time import VirtualLoop

from double.cluster import START_S, Replica
from double.engines import LEASE_S
from double.system import SessionSystem, nothing_held, session_system
from prefillshare.kvshare.errors import Conflict, DeadlineExceeded, PrefixLost, ResumeReason, Unavailable
from prefillshare.router.sessions.memory import MemorySessions

DECODERS = ("a", "b", "o", "base", "s", "t", "c", "d")
MOMENTS = ("prefill", "prefilled", "pull", "decode", "loaded", "token 1", "token 2", "token 5")
OURS = "prefillshare."
CLIENTS, SESSIONS_EACH = 8, 4
#: What a client may be told while replicas fail. Anything else is found.
MAY_FAIL = (Unavailable, DeadlineExceeded)
#: Virtual seconds after which a turn that has not ended hangs: longer than all time limits of a router together.
HANGS_AFTER_S = 300.0
#: Virtual seconds between two faults, at most; until those that were ejected are probed.
BETWEEN_S, PROBED_S = 0.6, 60.0
#: Turns before what is alive is counted for the first time: by then all that grows to a bound has reached it.
WARM_TURNS = 100


@dataclass
class Found:
    """`lost`: turns that ended in an error that nobody may get, or whose tokens were not kept. `wrong`: turns with a token, and
    sessions with a context, that an undisturbed run does not have. `refused`: turns that were told so, and changed nothing.
    `left_behind`: objects of ours that are still there when everything has ended, by class."""

    turns: int = 0
    refused: int = 0
    left: int = 0
    lost: int = 0
    wrong: int = 0
    hung: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    left_behind: dict[str, int] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.wrong or self.hung or self.problems or self.left_behind)


def soak(seed: int, turns: int, warm: int = WARM_TURNS, **of_system) -> Found:
    """`warm`: turns before them. `of_system`: as in double.system. The page at /ui is off: it keeps what turns have cost."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(Campaign(seed, turns, warm, {"ui": "off"} | of_system).run())


class Campaign:
    def __init__(self, seed: int, turns: int, warm: int, of_system: dict):
        self._turns, self._warm, self._of_system, self.found = turns, warm, of_system, Found()
        self._rng = random.Random(seed)
        #: Session -> its context, as it must be.
        self._contexts: dict[str, list[int]] = {}
        self._names = 0
        self.routers: list[SessionSystem] = []

    async def run(self) -> Found:
        async with AsyncExitStack() as within:
            one = await within.enter_async_context(session_system(**self._of_system))
            other = await within.enter_async_context(session_system(cluster=one.cluster, **self._of_system))
            other.sessions = other.turns.sessions = one.sessions = one.turns.sessions = MemorySessions(10_000, 1e9)
            self.routers = [one, other]
            await self._part(self._warm)
            before = self._ours()
            await self._part(self._warm + self._turns)
            grown = self._ours() - before
            self.found.left_behind = {name: count for name, count in grown.items() if count > CLIENTS}
        return self.found

    async def _part(self, turns: int) -> None:
        """Clients take turns until there are as many; then all is well again, checked, and given up."""
        rngs = [random.Random(self._rng.random()) for _ in range(CLIENTS)]
        clients = [asyncio.create_task(self._client(rng, turns)) for rng in rngs]
        storm = asyncio.create_task(self._storm(random.Random(self._rng.random())))
        await asyncio.gather(*clients)
        storm.cancel()
        await self._all_well()
        for name, context in self._contexts.items():
            if await self.routers[0].context(name) != context:
                self._tell(f"session {name} is not its history")
        for name in self._contexts:
            await self.routers[0].turns.delete(name)
        self._contexts.clear()
        for router in self.routers:
            await nothing_held(router, within_s=PROBED_S, leases_s=LEASE_S + 1)

    # What clients do.

    async def _client(self, rng: random.Random, turns: int) -> None:
        mine: list[str] = []
        while self.found.turns < turns:
            router = rng.choice(self.routers)
            if len(mine) < SESSIONS_EACH and rng.random() < 0.3:
                mine.append(await self._create(router, _tokens(rng, 40)))
            what = rng.random()
            if not mine or what < 0.1:
                await self._without_session(router, rng)
            elif what < 0.15:
                mine.append(await self._fork(router, rng.choice(mine)))
            elif what < 0.2 or len(mine) > SESSIONS_EACH:
                await self._delete(router, mine.pop(rng.randrange(len(mine))))
            elif what < 0.25:
                await self._two_at_once(router, rng, rng.choice(mine))
            else:
                await self._take(router, rng, rng.choice(mine))

    async def _create(self, router: SessionSystem, given: list[int]) -> str:
        self._names += 1
        name = f"s{self._names}"
        await router.turns.create(name, ("token_ids", given))
        self._contexts[name] = given
        return name

    async def _fork(self, router: SessionSystem, session: str) -> str:
        self._names += 1
        name = f"s{self._names}"
        await router.turns.fork(session, name)
        self._contexts[name] = list(self._contexts[session])
        return name

    async def _delete(self, router: SessionSystem, session: str) -> None:
        await router.turns.delete(session)
        del self._contexts[session]

    async def _without_session(self, router: SessionSystem, rng: random.Random) -> None:
        decoder, prompt, count = rng.choice(DECODERS), _tokens(rng, 60), rng.randint(1, 12)
        said = await self._ended(rng, lambda: router.turn(decoder, prompt, count))
        if said is not None and said != router.expected(decoder, prompt, count):
            self._tell(f"{decoder} said {said} to {prompt}")

    async def _take(self, router: SessionSystem, rng: random.Random, session: str) -> None:
        decoder, given, count = rng.choice(DECODERS), _tokens(rng, 20), rng.randint(1, 12)
        suffix = _tokens(rng, 6) if rng.random() < 0.2 else None
        before = list(self._contexts[session])
        said = await self._ended(rng, lambda: router.take(session, decoder, given, count, suffix))
        context = await router.context(session)
        if said is None:
            if context != before:
                self._tell(f"a turn of {session} that failed, or was left, has changed it")
                self._contexts[session] = context
            return
        if said != router.expected(decoder, [*before, *given, *(suffix or [])], count):
            self._tell(f"{decoder} said {said} on {session}")
        self._contexts[session] = [*before, *given, *said]
        if context != self._contexts[session]:
            self.found.lost += 1
            self._contexts[session] = context

    async def _two_at_once(self, router: SessionSystem, rng: random.Random, session: str) -> None:
        """One of two turns on a session is refused, whichever router is asked."""
        decoder, given, count = rng.choice(DECODERS), _tokens(rng, 20), rng.randint(1, 12)
        before = list(self._contexts[session])
        turns = (one.take(session, decoder, given, count) for one in self.routers)
        done = await asyncio.gather(*turns, return_exceptions=True)
        self.found.turns += 1
        refused = [turn for turn in done if isinstance(turn, Conflict)]
        said = [turn for turn in done if isinstance(turn, list)]
        failed = [turn for turn in done if isinstance(turn, MAY_FAIL)]
        if len(refused) + len(said) + len(failed) < 2:
            self._tell(f"two turns at once ended as {done}")
        for tokens in said:
            if tokens != router.expected(decoder, [*before, *given], count):
                self._tell(f"{decoder} said {tokens} on {session}, where two turns were asked for")
            before += [*given, *tokens]
        self._contexts[session] = before
        if await router.context(session) != before:
            self.found.lost += 1

    async def _ended(self, rng: random.Random, call: Callable[[], Awaitable[list[int]]]) -> list[int] | None:
        """What a turn said; None if it was refused, or was left by its client after a while."""
        turn = asyncio.create_task(call())
        self.found.turns += 1
        leaves = rng.random() < 0.15
        done, _ = await asyncio.wait({turn}, timeout=rng.uniform(0, 2) if leaves else HANGS_AFTER_S)
        if not done:
            self.found.left += leaves
            self.found.hung += not leaves
            turn.cancel()
            await asyncio.wait({turn})
            if turn.cancelled():
                return None
        try:
            return turn.result()
        except MAY_FAIL:
            self.found.refused += 1
        except Exception as error:
            self.found.lost += 1
            self._tell(f"{type(error).__name__}: {error}")
        return None

    # What fails.

    async def _storm(self, rng: random.Random) -> None:
        faults = {
            "die": lambda pool, replica: pool.kill(replica.name),
            "hang": lambda pool, replica: self._hang(replica, rng.uniform(0.5, 12)),
            "cannot": lambda pool, replica: replica.planned.update({rng.choice(MOMENTS): Unavailable("no")}),
            "drop": lambda pool, replica: replica.planned.update({rng.choice(MOMENTS): asyncio.CancelledError()}),
            "preempt": lambda pool, replica: replica.planned.update(
                {rng.choice(MOMENTS): PrefixLost("preempted", reason=ResumeReason.PREEMPTED)}
            ),
            "cannot load": lambda pool, replica: replica.planned.update(
                {rng.choice(MOMENTS): PrefixLost("no KV", reason=ResumeReason.KV_LOAD_FAILED)}
            ),
            "leases end": lambda pool, replica: self.routers[0].cluster.leases.end_all(),
            "cache is cleared": lambda pool, replica: replica.engine.cache.prompts.clear(),
            "clock jumps": lambda pool, replica: asyncio.get_running_loop().jump(rng.uniform(1, 40)),
        }
        while True:
            await asyncio.sleep(rng.uniform(0.05, BETWEEN_S))
            kind = rng.choice(list(faults))
            pool = rng.choice(list(self.routers[0].cluster.pools.values()))
            replica = rng.choice(list(pool.replicas.values()))
            if replica.is_dead:
                continue
            faults[kind](pool, replica)
            self.found.faults[kind] += 1

    @staticmethod
    def _hang(replica: Replica, seconds: float) -> None:
        replica.hang()
        asyncio.get_running_loop().call_later(seconds, replica.come_back)

    async def _all_well(self) -> None:
        for pool in self.routers[0].cluster.pools.values():
            for replica in pool.replicas.values():
                replica.planned.clear()
                replica.come_back()
        await asyncio.sleep(START_S + PROBED_S)

    def _ours(self) -> Counter[str]:
        """Objects of our classes that are alive, by class; those that the doubles keep are forgotten first."""
        cluster = self.routers[0].cluster
        cluster.calls_made.clear()
        for pool in cluster.pools.values():
            for replica in pool.replicas.values():
                replica.engine.cache.prompts.clear()
        gc.collect()
        kinds = (type(one) for one in gc.get_objects())
        return Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if str(kind.__module__).startswith(OURS))

    def _tell(self, problem: str) -> None:
        self.found.wrong += 1
        self.found.problems.append(problem)


def _tokens(rng: random.Random, most: int) -> list[int]:
    return [rng.randint(10, 99) for _ in range(rng.randint(1, most))]
