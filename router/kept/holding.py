"""Has replicas keep contexts.

 1. The replica that holds most of a context keeps it, of the pool that holds most (Fleet.keeper). If none holds much of it, one
    is chosen as for a prompt.
 2. What it lacks is computed behind all turns (router/pools/making.py). What comes up meanwhile for the same context waits, and
    only the latest of it is done.
 3. At most AT_ONCE contexts are seen to at once, and none for longer than it is kept.
 4. While a turn runs on a session, nothing is computed for it here: the turn does that. What is cached of it is kept.
 5. A replica that kept the context before lets it go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.errors import InvalidInput, PrefillShareError, Unavailable
from prefillshare.kvshare.keep import Keep
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.background import Background
from prefillshare.router.kept.budgets import Budgets
from prefillshare.router.kept.kept import Kept
from prefillshare.router.kept.store import KeptStore
from prefillshare.router.pools.cache_index import BlockKeys
from prefillshare.router.pools.calls import CALL_ERRORS, answer
from prefillshare.router.pools.fleet import Fleet
from prefillshare.router.pools.making import make_ahead
from prefillshare.router.pools.pool import Placed, Pool

logger = logging.getLogger(__name__)

AT_ONCE = 4
#: Seconds that a replica has to let something go; what it then still keeps ends by itself.
LET_GO_S = 10.0


#: Tenant and name of what is kept.
Key = tuple[str, str]


@dataclass(frozen=True)
class Wanted:
    """Keep these beginnings of a context, the longest last. `ready` is awaited first: what else computes the context's KV."""

    kept: Sequence[Kept]
    token_ids: list[int]
    salt: str | None
    ready: Callable[[], Awaitable[None]] | None = None

    @property
    def longest(self) -> Kept:
        return self.kept[-1]

    @property
    def key(self) -> Key:
        return self.longest.tenant, self.longest.name


class Holding:
    """`stride_tokens`: as of EagerPrefill."""

    def __init__(
        self, fleet: Fleet, store: KeptStore, budgets: Budgets, base: Base, metrics: Metrics, *, stride_tokens: int
    ):
        self._fleet, self._store, self._budgets, self._base, self._metrics = fleet, store, budgets, base, metrics
        self._stride_tokens = stride_tokens
        self._background, self._slots = Background(metrics), asyncio.Semaphore(AT_ONCE)
        self._running: dict[Key, tuple[asyncio.Task, Wanted]] = {}
        self._next: dict[Key, Wanted] = {}
        self._in_turn: set[Key] = set()

    def check(self) -> None:
        """Raises InvalidInput if no engine of the deployment may ever keep anything, Unavailable if none can now."""
        if not self._fleet.keepers:
            raise InvalidInput("no pool of this deployment shares KV", fix="serve decoders in a mode that shares")
        if not capacity_blocks(self._fleet):
            raise Unavailable("no replica that could keep it is ready", fix="try again")

    def hold(self, wanted: Wanted) -> None:
        """Begin to have a replica keep it; later, if this is being done for the same context."""
        if wanted.key in self._running:
            self._next[wanted.key] = wanted
            return
        task = self._background.start("keeping", self._see_to(wanted), context=wanted.key)
        self._running[wanted.key] = task, wanted
        task.add_done_callback(lambda _: self._ended(wanted.key))

    @contextmanager
    def turn(self, key: Key) -> Iterator[None]:
        """A turn runs on a session of this name."""
        self._in_turn.add(key)
        if key in self._running:
            task, wanted = self._running[key]
            self._next.setdefault(key, wanted)
            task.cancel()
        try:
            yield
        finally:
            self._in_turn.discard(key)

    def let_go(self, kept: Kept) -> None:
        """Begin to have the context's replica let it go. Shorter beginnings of it that are being seen to still are."""
        key = (kept.tenant, kept.name)
        under_way = [wanted for wanted in [self._next.pop(key, None)] if wanted]
        if key in self._running:
            task, wanted = self._running[key]
            task.cancel()
            under_way.append(wanted)
        for wanted in under_way:
            if left := [one for one in wanted.kept if one.name != kept.name]:
                self.hold(replace(wanted, kept=left))
        if kept.replica:
            self._background.start("keeping", self._have_let_go(kept), context=key)

    def held_tokens(self, kept: Kept) -> int:
        """How many tokens of it a replica keeps, by what that has told."""
        pool = self._fleet.pools.get(kept.pool)
        if pool is None or kept.replica not in pool.replicas.members:
            return 0
        there = pool.kept().get(kept.replica)
        return there.names.get(kept.engine_name, 0) if there else 0

    def is_missing(self, kept: Kept) -> bool:
        """Whether no replica keeps all of it, and nothing is done about it."""
        return (kept.tenant, kept.name) not in self._running and self.held_tokens(kept) < self._tokens(kept)

    def has_room(self, kept: Kept) -> bool:
        """Whether a replica may keep it in blocks that no request uses."""
        return any(
            self._fits(pool, replica.id, kept) and replica.info.blocks_total - replica.stats.blocks_used >= kept.blocks
            for pool in self._fleet.keepers
            for replica in pool.replicas.usable()
        )

    async def stop(self) -> None:
        self._next.clear()
        await self._background.stop()

    def _ended(self, key: Key) -> None:
        self._running.pop(key, None)
        if wanted := self._next.pop(key, None):
            self.hold(wanted)

    async def _see_to(self, wanted: Wanted) -> None:
        try:
            async with asyncio.timeout(max(kept.left_s for kept in wanted.kept)):
                if wanted.ready:
                    await wanted.ready()
                async with self._slots:
                    await self._keep_on_a_replica(wanted)
            outcome = "done"
        except (PrefillShareError, TimeoutError, *CALL_ERRORS) as error:
            logger.warning("%s is not kept on a replica: %s: %s", wanted.longest.name, type(error).__name__, error)
            outcome = "failed"
        self._metrics["keeps_total"].labels(outcome).inc()

    async def _keep_on_a_replica(self, wanted: Wanted) -> None:
        size, tokens = self._base.block_size, self._tokens(wanted.longest)
        if not tokens:
            return
        # A token more than the whole blocks: engines always compute a prompt's last token, and with it the rest of its block.
        token_ids = [*wanted.token_ids[:tokens], (wanted.token_ids[tokens:] or wanted.token_ids)[0]]
        keys = BlockKeys(token_ids, size, salt=wanted.salt)
        pool = self._fleet.keeper(keys)
        placed = await self._place(pool, token_ids, keys, wanted.longest)
        if wanted.key in self._in_turn:
            if placed.cached_tokens < max(size, self.held_tokens(wanted.longest)):
                return
            token_ids = token_ids[: placed.cached_tokens + 1]
        keep = [Keep(kept.engine_name, self._tokens(kept), kept.left_s, kept.rank) for kept in wanted.kept]
        made = self._metrics["keep_prefill_tokens_total"].inc
        how = {"stride_tokens": self._stride_tokens, "block_size": size, "keep": keep}
        await make_ahead(pool, placed, token_ids, wanted.salt, made=made, **how)
        for kept in wanted.kept:
            if kept.replica and kept.replica != placed.replica.id:
                self._background.start("keeping", self._have_let_go(kept), context=kept.name)
        names = [kept.name for kept in wanted.kept]
        gone = await self._store.placed(wanted.longest.tenant, names, pool.name, placed.replica.id)
        for kept in wanted.kept:
            if kept.name in gone:  # let go, or replaced, while the replica was told to keep it
                there = replace(kept, pool=pool.name, replica=placed.replica.id)
                self._background.start("keeping", self._have_let_go(there), context=kept.name)

    async def _place(self, pool: Pool, token_ids: list[int], keys: BlockKeys, kept: Kept) -> Placed:
        held = pool.most_cached(len(token_ids), keys)
        if held and held.cached_tokens * 2 >= len(token_ids):
            return held
        return await pool.choose(len(token_ids), keys, fits=lambda replica: self._fits(pool, replica, kept))

    def _fits(self, pool: Pool, replica: str, kept: Kept) -> bool:
        there, info = pool.kept().get(replica), pool.replicas.members[replica].info
        return self._budgets.has_room(there.blocks if there else 0, kept.blocks, info.blocks_total)

    def _tokens(self, kept: Kept) -> int:
        """How much of it an engine can keep: it computes one token more, and generates one."""
        size = self._base.block_size
        return min(kept.blocks, (self._base.max_model_len - 2) // size) * size

    async def _have_let_go(self, kept: Kept) -> None:
        pool = self._fleet.pools.get(kept.pool)
        if pool is None or kept.replica not in pool.replicas.members:
            return
        try:
            async with asyncio.timeout(LET_GO_S):
                await answer(pool.replicas.on(kept.replica).let_go.remote([kept.engine_name]))
        except (PrefillShareError, TimeoutError, *CALL_ERRORS) as error:
            logger.warning("%s keeps %s until its time is over: %s", kept.replica, kept.name, error)


def capacity_blocks(fleet: Fleet) -> int:
    """Blocks of the replicas that may keep something."""
    return sum(replica.info.blocks_total for pool in fleet.keepers for replica in pool.replicas.usable())
