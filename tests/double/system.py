"""The router's own fleet and turns over a cluster of doubles; shows token by token what a client would get."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from types import MappingProxyType, SimpleNamespace

from prometheus_client import CollectorRegistry
from virtual_time import clock

from double import arithmetic
from double.cluster import Cluster
from double.engines import BLOCK, BaseDecodeEngine, DecodeEngine, PrefillEngine
from double.frontend import Frontend
from prefillshare.kvshare.caller import ANONYMOUS, Caller
from prefillshare.kvshare.config import Base, Router
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.modes import get_mode
from prefillshare.kvshare_vllm.sampling import make_sampling_params
from prefillshare.kvshare_vllm.surface.turn_call import TurnCall
from prefillshare.router.accounts.accounts import Accounts
from prefillshare.router.admission.grant import TenantShare
from prefillshare.router.ahead.eager import EagerPrefill
from prefillshare.router.ahead.pull_back import PullBack
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.clock import taken_from
from prefillshare.router.kept.keeper import Keeper
from prefillshare.router.kept.memory import MemoryKept
from prefillshare.router.pools.fleet import Fleet
from prefillshare.router.sessions.kept_sessions import context_of
from prefillshare.router.sessions.memory import MemorySessions
from prefillshare.router.sessions.turns import Turns
from prefillshare.router.tenants import Tenants
from prefillshare.router.turn.orchestrator import Orchestrator
from prefillshare.router.turn.terms import Terms
from prefillshare.router.turn.turn import Turn

#: Decoders of each pool; "base" is served by the first.
ADAPTERS = {"agents": ("a", "b", "o"), "streams": ("s", "t"), "alone": ("c", "d")}
#: Decoder -> how many of a prompt's last tokens it computes itself: more than a block, and no whole number of them.
OWN_TOKENS = {"o": BLOCK + 3}
#: Of the KV of one token.
KV_BYTES = 100
SHARING = {"agents": "prefillshare", "streams": "icarus", "alone": "none"}


def deployment(replicas: int, in_place: bool = False, local_prefill: str | None = None, **router) -> SimpleNamespace:
    """The parts of a deployment that a fleet and an orchestrator read. `in_place`, `local_prefill`: as in `system`."""
    pools = [
        SimpleNamespace(
            pool=name,
            sharing=SHARING[name],
            adapters=dict.fromkeys(names, ""),
            fewest_replicas=replicas,
            makes_base_kv=bool(local_prefill) and get_mode(SHARING[name]).base_in_place,
            prefill_policy=local_prefill if get_mode(SHARING[name]).base_in_place else None,
        )
        for name, names in ADAPTERS.items()
    ]
    return SimpleNamespace(
        name="doubles",
        base=Base(model="m", block_size=BLOCK, max_model_len=4096),
        decode=pools,
        shared_prefill=None if in_place else SimpleNamespace(),
        router=Router(**{"wedged_after_s": 4, "replica_wait_s": 20} | router),
        cluster=SimpleNamespace(start_timeout_s=30),
    )


class System:
    def __init__(self, cluster: Cluster, fleet: Fleet, orchestrator: Orchestrator, metrics: Metrics):
        self.cluster, self.fleet, self.orchestrator, self.metrics = cluster, fleet, orchestrator, metrics
        self._numbers = itertools.count()

    def pool_of(self, decoder: str):
        return self.cluster.pools[self.orchestrator.decoders[decoder].pool]

    def prefill_of(self, decoder: str):
        return self.cluster.pools[self.orchestrator.routes[self.orchestrator.decoders[decoder].pool].makers.name]

    def run(
        self, decoder: str, prompt: list[int], tokens: int, caller: Caller = ANONYMOUS, **terms
    ) -> AsyncIterator[TokenChunk]:
        return self.turn_of(decoder, prompt, tokens, caller, **terms).chunks()

    def turn_of(self, decoder: str, prompt: list[int], tokens: int = 6, caller: Caller = ANONYMOUS, **terms) -> Turn:
        sampling = SimpleNamespace(max_tokens=tokens, logprobs=None, structured_outputs=None)
        call = TurnCall(decoder, prompt, sampling, f"r{next(self._numbers)}", caller, terms=Terms(**terms))
        return self.orchestrator.turn(call)

    async def turn(self, decoder: str, prompt: list[int], tokens: int = 6, **terms) -> list[int]:
        return [token async for chunk in self.run(decoder, prompt, tokens, **terms) for token in chunk.token_ids]

    def expected(self, decoder: str, prompt: list[int], tokens: int = 6) -> list[int]:
        """The decoder's response if every position's KV is made by the right weights."""
        return self.expected_of(decoder, self.orchestrator.decoders[decoder].pool, prompt, tokens)

    def expected_of(self, decoder: str, pool: str, prompt: list[int], tokens: int) -> list[int]:
        """The same for a decoder that may no longer be served."""
        mode, name = get_mode(SHARING[pool]), decoder  # the base has the same name as a maker of KV
        shared = mode.handoff_tokens(len(prompt), own_tokens=OWN_TOKENS.get(decoder, 1)) if mode.shares_prefill else 0
        generated_by = arithmetic.BASE if mode.lends_responses else None
        return arithmetic.response(prompt, name, tokens, shared=shared, generated_by=generated_by)

    def held(self) -> dict[str, object]:
        """Leases, calls and room that are held: must be empty once no turn runs."""
        admission = self.orchestrator.services.admission
        found = {"leases": self.cluster.leases.held, "in progress": admission.in_progress}
        for name, pool in self.fleet.pools.items():
            found[f"calls of {name}"] = sum(replica.active for replica in pool.replicas.members.values())
            found[f"tokens of {name}"] = sum(replica.queued_tokens for replica in pool.replicas.members.values())
            found[f"engines of {name}"] = sum(one.engine.active for one in self.cluster.pools[name].replicas.values())
        for name in ADAPTERS:
            found[f"room of {name}"] = dict(admission.held(name))
        return {what: value for what, value in found.items() if value}


class SessionSystem(System):
    """A system with sessions in memory, eager prefill and pull-back."""

    def __init__(self, *parts):
        super().__init__(*parts)
        fleet, base, metrics = self.fleet, deployment(1).base, self.metrics
        rate = self.orchestrator.services.compute_s
        self.eager = EagerPrefill(fleet.maker_ahead, base, metrics, limit=4, stride_tokens=16)
        self.pull_back = PullBack(
            fleet.shared_prefill, base, metrics, when="always", limit=4, compute_s=lambda: rate.value
        )
        self.sessions = MemorySessions(1_000, 3600)
        self.frontend = Frontend(self.orchestrator)
        config = SimpleNamespace(router=self.orchestrator.services.config, base=base)
        self.keeper = Keeper.of(config, fleet, metrics, Tenants(), MemoryKept(clock), partial(context_of, self.sessions))
        response_kv = ResponseKV(self.eager, self.pull_back, self.keeper)
        self.turns = Turns(base, self.orchestrator.decoders, self.frontend, self.sessions, response_kv)

    async def take(self, session: str, decoder: str, given: list[int], tokens: int = 6, suffix: list[int] | None = None):
        """Take a turn on a session and return its tokens."""
        suffix = ("token_ids", suffix) if suffix else None
        sampling = make_sampling_params(max_tokens=tokens)
        name = f"r{next(self._numbers)}"
        events = self.turns.take(session, decoder, ("token_ids", given), suffix, sampling, name, ANONYMOUS)
        async with aclosing(events) as stream:
            return [token async for event in stream for token in event.token_ids]

    async def context(self, session: str) -> list[int]:
        return list((await self.sessions.get(session, tenant="")).token_ids)

    async def stop(self) -> None:
        await self.eager.stop()
        await self.pull_back.stop()
        await self.keeper.stop()
        self.frontend.close()


@asynccontextmanager
async def session_system(replicas: int = 2, cluster: Cluster | None = None, **settings):
    async with system(replicas, kind=SessionSystem, cluster=cluster, **settings) as running:
        try:
            yield running
        finally:
            await running.stop()


@asynccontextmanager
async def system(
    replicas: int = 2,
    kind: type[System] = System,
    cluster: Cluster | None = None,
    in_place: bool = False,
    local_prefill: str | None = None,
    accounts: Callable[[Metrics], Accounts] | None = None,
    tenants: Mapping[str, TenantShare] = MappingProxyType({}),
    **router,
):
    """`cluster`: that of another system, whose engines both use. `in_place`: without a shared prefill pool. `local_prefill`:
    the policy of decode engines that hold the base; None: they cannot make its KV beside a prefill pool. `accounts`: makes the
    router's; by default they are in memory. `router`: settings of router.* that differ from the usual."""
    local_prefill = local_prefill or ("auto" if in_place else None)
    wanted = deployment(replicas, in_place, local_prefill, **router)
    owned, pools = cluster is None, {} if in_place else {"prefill": (PrefillEngine, get_mode("prefillshare"), replicas)}
    for name, sharing in SHARING.items():
        makes_base_kv = local_prefill and get_mode(sharing).base_in_place
        pools[name] = (BaseDecodeEngine if makes_base_kv else DecodeEngine, get_mode(sharing), replicas)
        if not get_mode(sharing).shares_prefill:
            pools[f"prefill-{name}"] = (PrefillEngine, get_mode(sharing), replicas)
    cluster, metrics = cluster or Cluster(pools), Metrics(CollectorRegistry())
    with taken_from(clock):
        fleet = Fleet(BLOCK, lambda name: cluster.pools[name].handle, metrics)
        fleet._index = cluster.index
        local = {pool: local_prefill if get_mode(SHARING[pool]).base_in_place else None for pool in ADAPTERS}
        decoders = {
            name: Decoder(
                name, pool, SHARING[pool], name, "lora", own_tokens=OWN_TOKENS.get(name, 1), local_prefill=local[pool]
            )
            for pool, names in ADAPTERS.items()
            for name in names
        } | {"base": Decoder("base", "agents", SHARING["agents"], None, "base", local_prefill=local["agents"])}
        try:
            routes = await fleet.adopt(wanted)
            account = (accounts or (lambda metrics: Accounts.in_memory(metrics, BLOCK, KV_BYTES)))(metrics)
            orchestrator = Orchestrator(wanted.router, wanted.base, decoders, routes, metrics, tenants, 3.0, account)
            yield kind(cluster, fleet, orchestrator, metrics)
            await orchestrator.services.releases._background.stop()
            await account.close()
        finally:
            await fleet.stop()
            await fleet._background.stop()
            if owned:
                cluster.close()


async def nothing_held(running: System, *, within_s: float = 2.0, leases_s: float | None = None) -> None:
    """Check that nothing is held shortly after the last turn has ended. `leases_s`: how long a lease may last that nobody could
    end."""
    began = clock()
    while held := running.held():
        may_last_s = leases_s if leases_s and held.keys() == {"leases"} else within_s
        assert clock() < began + may_last_s, held
        await asyncio.sleep(0.05)
