"""Pools of replicas behind handles like Ray Serve's, as far as routers use these, and every way in which a replica fails."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

from ray.exceptions import RayActorError

from double.engines import BLOCK, DecodeEngine, Engine, Leases, PrefillEngine
from prefillshare.kvshare.errors import ReplicaLost
from prefillshare.kvshare.modes import SharingMode
from prefillshare.router.pools.cache_index import BlockKeys, KeptThere
from prefillshare.router.pools.pinned import MEMBERS, WATCHERS, tell

APP = "double"
#: Virtual seconds that a call takes to arrive, until a death is known, and until a replica has started.
CALL_S, KNOWN_S, START_S = 0.002, 0.5, 5.0


class Replica:
    """A replica that answers, hangs, or is dead."""

    def __init__(self, name: str, engine_class: type[Engine], mode: SharingMode, leases: Leases):
        self.name, self.is_dead = name, False
        self.engine = engine_class(name, mode, leases, self._moment)
        #: Moment -> what happens at it, once: an error that is raised, or a function that is called.
        self.planned: dict[str, BaseException | Callable[[], None]] = {}
        self.calls: set[asyncio.Task] = set()
        self._answers = asyncio.Event()
        self._answers.set()

    def hang(self) -> None:
        self._answers.clear()

    def come_back(self) -> None:
        self._answers.set()

    def die(self) -> None:
        self.is_dead = True
        for call in self.calls:
            call.cancel()

    async def answers(self) -> None:
        await self._answers.wait()

    async def _moment(self, name: str) -> None:
        await self.answers()
        planned = self.planned.pop(name, None)
        if isinstance(planned, BaseException):
            raise planned
        if planned is not None:
            planned()
            await asyncio.sleep(0)  # if that has cancelled this call, it ends here
            await self.answers()


class Pool:
    """The replicas of one Serve deployment, and their handle."""

    def __init__(
        self, name: str, engine_class: type[Engine], mode: SharingMode, leases: Leases, replicas: int, calls: list[Response]
    ):
        self.calls = calls
        self.name, self._new = name, partial(Replica, engine_class=engine_class, mode=mode, leases=leases)
        self._numbers = itertools.count(1)
        self.replicas: dict[str, Replica] = {}
        self.handle = Handle(self)
        for _ in range(replicas):
            self.start()

    @property
    def deployment(self) -> tuple[str, str]:
        return APP, self.name

    def start(self) -> Replica:
        replica = self._new(f"{self.name}-{next(self._numbers)}")
        self.replicas[replica.name] = replica
        self._tell()
        return replica

    def kill(self, replica: str) -> None:
        """The replica's calls fail at once. As with Serve, routers learn of it later, and another replica starts."""
        self.replicas[replica].die()
        loop = asyncio.get_running_loop()
        loop.call_later(KNOWN_S, self._forget, replica)
        loop.call_later(START_S, self.start)

    def busy(self) -> Replica:
        (one,) = [replica for replica in self.replicas.values() if replica.engine.active]
        return one

    def _forget(self, replica: str) -> None:
        del self.replicas[replica]
        self._tell()

    def _tell(self) -> None:
        tell(self.deployment, self.replicas)


class Handle:
    """Like a Serve handle: `options(session_id=...)` names the replica that is called."""

    is_initialized = True

    def __init__(self, pool: Pool, replica: str = "", streams: bool = False):
        self._pool, self._replica, self._streams = pool, replica, streams
        self.deployment_id = SimpleNamespace(app_name=APP, name=pool.name)

    def options(self, *, session_id: str = "", stream: bool | None = None, **_) -> Handle:
        return Handle(self._pool, session_id or self._replica, self._streams if stream is None else stream)

    def __getattr__(self, method: str):
        if method.startswith("_"):
            raise AttributeError(method)
        return SimpleNamespace(remote=partial(self._call, method))

    def _call(self, method: str, *args, **kwargs) -> Response:
        call = (Stream if self._streams else Answer)(self._pool, self._replica, method, args, kwargs)
        self._pool.calls.append(call)
        return call


class Response(ABC):
    """A call that is under way. A task that waits for it may stop waiting without ending the call."""

    def __init__(self, pool: Pool, name: str, method: str, args, kwargs):
        self.pool, self.method, self.args, self.kwargs, self.is_cancelled = pool.name, method, args, kwargs, False
        self._replica = pool.replicas.get(name)
        self._task = asyncio.create_task(self._run(name, method, args, kwargs))
        if self._replica:
            self._replica.calls.add(self._task)
            self._task.add_done_callback(self._replica.calls.discard)
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def cancel(self) -> None:
        self.is_cancelled = True
        self._task.cancel()

    async def _run(self, name: str, method: str, args, kwargs):
        await asyncio.sleep(CALL_S)
        if self._replica is None:
            raise ReplicaLost(f"replica {name} is gone")
        try:
            if self._replica.is_dead:
                raise asyncio.CancelledError
            await self._replica.answers()
            return await self._take(getattr(self._replica.engine, method)(*args, **kwargs))
        except asyncio.CancelledError:
            if self._replica.is_dead:
                raise RayActorError from None
            raise

    @abstractmethod
    async def _take(self, result):
        """Consume what the replica's method has returned, to its end."""


class Answer(Response):
    def __await__(self):
        return asyncio.shield(self._task).__await__()

    async def _take(self, result: Awaitable):
        return await result


class Stream(Response):
    def __init__(self, *call):
        self._chunks: asyncio.Queue = asyncio.Queue()
        super().__init__(*call)
        self._task.add_done_callback(lambda _: self._chunks.put_nowait(None))

    async def _take(self, result: AsyncIterator):
        try:
            async for chunk in result:
                self._chunks.put_nowait(chunk)
        finally:
            await result.aclose()

    async def __aiter__(self):
        while (chunk := await self._chunks.get()) is not None:
            yield chunk
        self._task.result()  # raises the call's error, if any


class Index:
    """Stands in for CacheIndex: looks up directly what the engines hold, without events."""

    block_size = BLOCK

    def __init__(self, pools: dict[str, Pool]):
        self._pools, self._known = pools, defaultdict(set)

    async def add(self, pool: str, replica: str, events) -> None:
        self._known[pool].add(replica)

    async def remove(self, pool: str, replica: str) -> None:
        self._known[pool].discard(replica)

    def overlaps(self, pool: str, keys: BlockKeys) -> dict[str, int]:
        replicas = self._pools[pool].replicas
        held = {name: replicas[name].engine.cache.tokens(keys) for name in self._known[pool] if name in replicas}
        return {name: tokens for name, tokens in held.items() if tokens}

    def kept(self, pool: str) -> dict[str, KeptThere]:
        replicas = self._pools[pool].replicas
        return {name: replicas[name].engine.kept for name in self._known[pool] if name in replicas}

    async def close(self) -> None: ...


class Cluster:
    """`pools`: name -> (engine class, sharing mode, replicas)."""

    def __init__(self, pools: dict[str, tuple[type[Engine], SharingMode, int]]):
        self.leases = Leases()
        self.calls_made: list[Response] = []
        self.pools = {
            name: Pool(name, kind, mode, self.leases, count, self.calls_made) for name, (kind, mode, count) in pools.items()
        }
        self.index = Index(self.pools)

    def calls(self, *methods: str) -> list[Response]:
        """The calls that were made of these methods, in order."""
        return [call for call in self.calls_made if call.method in methods]

    def close(self) -> None:
        for pool in self.pools.values():
            for of in (MEMBERS, WATCHERS):
                with suppress(KeyError):
                    del of[pool.deployment]


__all__ = ["Cluster", "DecodeEngine", "Pool", "PrefillEngine", "Replica"]
