"""Replicas as routers call them, with the same methods, errors and ownership of KV, but arithmetic instead of engines."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from double.arithmetic import BASE, KV, extended, next_token
from prefillshare.kvshare.decode_request import DecodeRequest
from prefillshare.kvshare.errors import ContractMismatch, Internal, PrefixLost, ResumeReason, Unavailable
from prefillshare.kvshare.handoff import Handoff, PrefillResult, TokenChunk
from prefillshare.kvshare.keep import Keep
from prefillshare.kvshare.modes import SharingMode
from prefillshare.kvshare.replica_info import KVEvents, ReplicaInfo, ReplicaStats
from prefillshare.router.pools.cache_index import BlockKeys, KeptThere

BLOCK = 8
CONTRACT = "one"
#: Virtual seconds.
TOKEN_PREFILL_S, LOAD_S, STEP_S, LEASE_S = 0.001, 0.05, 0.1, 20.0


@dataclass
class Lease:
    """`until`: by the event loop's clock."""

    kv: KV
    until: float


class Leases:
    """The leases of all engines of the cluster."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._numbers = itertools.count()

    def lend(self, kv: KV, lease_s: float) -> Handoff:
        name = f"lease-{next(self._numbers)}"
        self._leases[name] = Lease(kv, _now() + lease_s)
        return Handoff(len(kv), CONTRACT, lease_s, {"lease": name})

    def read(self, handoff: Handoff) -> KV:
        """Ends the lease. Raises PrefixLost if it has ended before (R6)."""
        lease = self._leases.pop(handoff.transfer["lease"], None)
        if lease is None or lease.until < _now():
            raise PrefixLost("the lease has ended", reason=ResumeReason.KV_LOAD_FAILED)
        return lease.kv

    def release(self, handoff: Handoff) -> None:
        self._leases.pop(handoff.transfer["lease"], None)

    def end_all(self) -> None:
        """Let all of them run out at once."""
        for lease in self._leases.values():
            lease.until = _now() - 1

    @property
    def held(self) -> int:
        """Number of leases that have not run out."""
        return sum(lease.until >= _now() for lease in self._leases.values())


@dataclass
class Cache:
    """The full blocks of the prompts that an engine has computed or read."""

    prompts: list[BlockKeys] = field(default_factory=list)

    def add(self, token_ids: list[int], salt: str | None, adapter: str | None = None) -> None:
        self.prompts.append(BlockKeys(token_ids, BLOCK, salt=salt, adapter=adapter))

    def tokens(self, keys: BlockKeys) -> int:
        return max((keys.shared_tokens(known, BLOCK) for known in self.prompts), default=0)


class Engine:
    """One replica. `moment` is called at each step of a call where something may go wrong, with the step's name."""

    def __init__(self, name: str, mode: SharingMode, leases: Leases, moment: Callable[[str], Awaitable[None]]):
        self.name, self.mode, self.leases, self._moment = name, mode, leases, moment
        self.cache, self.active = Cache(), 0
        #: Name -> (what is kept under it, until when).
        self._kept: dict[str, tuple[Keep, float]] = {}

    @property
    def kept(self) -> KeptThere:
        names = {name: keep.tokens for name, (keep, until) in self._kept.items() if until > _now()}
        return KeptThere(names, sum(names.values()) // BLOCK)

    def give_up(self, name: str, tokens: int = 0) -> None:
        """As an engine whose requests need the room: only so much is kept and cached."""
        keep, until = self._kept.pop(name)
        if tokens:
            self._kept[name] = replace(keep, tokens=tokens), until
        self.cache.prompts.clear()

    async def describe(self) -> ReplicaInfo:
        return ReplicaInfo(self.name, KVEvents("", None), 1_000, BLOCK, 16)

    async def stats(self) -> ReplicaStats:
        return ReplicaStats(active=self.active, blocks_total=1_000)

    async def probe(self) -> None: ...

    async def adapters(self) -> dict[str, str]:
        return {}

    async def release(self, handoff: Handoff, request_id: str) -> None:
        self.leases.release(handoff)

    async def prefill(self, token_ids, request_id, *, adapter=None, cache_salt=None, **_) -> PrefillResult:
        with self._call():
            cached = await self._make(token_ids, adapter, cache_salt)
            handoff = self.leases.lend(extended((), token_ids, adapter or BASE), LEASE_S)
            return PrefillResult(handoff, len(token_ids), cached, 0.01)

    async def warm(self, token_ids, request_id, *, cache_salt=None, keep=(), **_) -> PrefillResult:
        with self._call():
            cached = await self._make(token_ids, None, cache_salt)
            for one in keep:
                whole = min(one.tokens, len(token_ids)) // BLOCK * BLOCK
                self._kept[one.name] = replace(one, tokens=whole), _now() + one.ttl_s
            return PrefillResult(None, len(token_ids), cached, 0.01)

    async def let_go(self, names) -> None:
        for name in names:
            self._kept.pop(name, None)

    async def _make(self, token_ids, adapter, salt) -> int:
        """Returns how many tokens were cached."""
        await self._moment("prefill")
        known = self.cache.tokens(BlockKeys(token_ids, BLOCK, salt=salt, adapter=adapter))
        cached = min(known, (len(token_ids) - 1) // BLOCK * BLOCK)
        await asyncio.sleep((len(token_ids) - cached) * TOKEN_PREFILL_S)
        await self._moment("prefilled")
        self.cache.add(token_ids, salt, adapter)
        return cached

    @contextmanager
    def _call(self):
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1


class PrefillEngine(Engine):
    async def pull(self, token_ids, lent, request_id, *, cache_salt=None) -> PrefillResult:
        with self._call():
            await self._moment("pull")
            await asyncio.sleep(LOAD_S)
            if self.leases.read(lent)[: len(token_ids) - 1] != extended((), token_ids[:-1], BASE):
                raise Internal("what was lent is not the base's KV of these tokens")
            self.cache.add(token_ids, cache_salt)
            return PrefillResult(None, len(token_ids), len(token_ids) - 1, 0.01)


class DecodeEngine(Engine):
    def __init__(self, *parts):
        super().__init__(*parts)
        self._words: dict[str, str] = {}

    async def decode(self, request: DecodeRequest):
        """An adapter of None is the base."""
        if self._words.setdefault(request.request_id, "begun") != "begun":
            raise Unavailable(f"{request.request_id} was given up before it came")
        with self._call():
            await self._moment("decode")
            decoder = request.adapter or BASE
            kv, local_tokens = await self._shared(request)
            maker = BASE if self.mode.lends_responses else decoder
            kv = extended(kv, request.token_ids[len(kv) :], maker)
            for number in range(request.replay + 1, request.sampling.max_tokens + 1):
                await asyncio.sleep(STEP_S)
                await self._moment(f"token {number}")
                token = next_token(kv, decoder)
                is_last = number == request.sampling.max_tokens
                lent = self.leases.lend(kv, LEASE_S) if is_last and request.lend else None
                reason, read = "length" if is_last else None, 64 if request.handoff else 0
                yield TokenChunk([token], finish_reason=reason, kv_bytes=read, local_tokens=local_tokens, lent=lent)
                kv = extended(kv, [token], maker)

    async def _shared(self, request: DecodeRequest) -> tuple[KV, int]:
        """Read the shared prefix, after checking the handoff as an engine does. Returns it, and how much of it was cached."""
        token_ids, handoff, replay = request.token_ids, request.handoff, request.replay
        expected = self.mode.handoff_tokens(len(token_ids) - replay, replay, request.own_tokens)
        if handoff is None:
            return await self._without_handoff(request, expected)
        if handoff.contract != CONTRACT:
            raise ContractMismatch("another contract")
        if handoff.tokens != expected:
            raise Internal(f"a handoff of {handoff.tokens} tokens for a shared prefix of {expected}")
        try:
            await asyncio.sleep(LOAD_S)
            await self._moment("loaded")
        except asyncio.CancelledError:  # an engine that drops a request says that nobody will read
            self.leases.release(handoff)
            raise
        kv = self.leases.read(handoff)
        self.cache.add(token_ids[:expected], request.cache_salt)
        return kv, 0

    async def _without_handoff(self, request: DecodeRequest, expected: int) -> tuple[KV, int]:
        if expected:
            raise Internal("a prompt of several tokens came without a handoff (R1)")
        return (), 0

    async def give_up(self, handoff: Handoff, request_id: str) -> None:
        if self._words.setdefault(request_id, "given up") == "given up":
            self.leases.release(handoff)


class BaseDecodeEngine(DecodeEngine):
    """One that holds the base, and makes its KV itself."""

    async def _without_handoff(self, request: DecodeRequest, expected: int) -> tuple[KV, int]:
        shared = request.token_ids[:expected]
        cached = await self._make(shared, None, request.cache_salt) if shared else 0
        return extended((), shared, BASE), cached


def _now() -> float:
    return asyncio.get_running_loop().time()
