"""Keeping and letting go over gRPC, as the client sees it. The store and the budgets are real; no engine runs."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import pytest
from ports import free_port
from prometheus_client import CollectorRegistry

from prefillshare.client import Client
from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare.config import Base, Router
from prefillshare.kvshare.errors import InvalidInput, NotFound, OverLimit
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.kept.budgets import Budgets
from prefillshare.router.kept.keeper import Keeper
from prefillshare.router.kept.memory import MemoryKept
from prefillshare.router.sessions import MemorySessions
from prefillshare.router.sessions.kept_sessions import KeptSessions
from prefillshare.router.surfaces.grpc_api import GrpcServer, Servicer
from prefillshare.router.tenants import Tenant, Tenants

BLOCK = 32
KEYS = {name: f"{name}-0123456789abcdef" for name in ("ferry", "harbour")}


class NoReplicas:
    """In the place of Holding and Upkeep."""

    def __init__(self):
        self.let_gone = []

    def check(self) -> None: ...

    def hold(self, wanted) -> None: ...

    def let_go(self, kept) -> None:
        self.let_gone.append(kept.engine_name)

    def held_tokens(self, kept) -> int:
        return BLOCK

    def turn(self, key):
        return nullcontext()

    def keeps(self, tenant) -> None: ...


class Surface:
    def __init__(self, sessions: MemorySessions, keeper: Keeper):
        self.sessions, self.kept = sessions, KeptSessions(sessions, keeper)


@pytest.fixture
async def running():
    """(client of each tenant, replicas)"""
    tenants = Tenants({
        "ferry": Tenant(keys=(KEYS["ferry"],), max_kept_tokens=10 * BLOCK + 5),
        "harbour": Tenant(keys=(KEYS["harbour"],), weight=3),
    })
    base, sessions, replicas = Base(model="m", block_size=BLOCK), MemorySessions(100, 600), NoReplicas()
    budgets = Budgets(Router(), BLOCK, tenants, lambda: 200)
    keeper = Keeper(MemoryKept(), budgets, replicas, replicas, base, Metrics(CollectorRegistry()))
    for tenant in KEYS:
        for name, blocks in (("small", 4), ("large", 11), ("second", 7)):
            await sessions.create(name, [len(name), *range(blocks * BLOCK)], tenant=tenant)
    port = free_port()
    server = GrpcServer(Servicer(Surface(sessions, keeper), None), "127.0.0.1", port, tenants)
    await server.start()
    clients = {tenant: Client(f"127.0.0.1:{port}", api_key=key, timeout_s=30) for tenant, key in KEYS.items()}
    replicas.keeper = keeper
    yield clients, replicas
    for client in clients.values():
        client.close()
    await server.stop(0)


async def test_a_session_is_kept_listed_and_let_go(running):
    clients, replicas = running
    client = clients["ferry"]

    def use():
        session = client.session("small")
        kept = session.keep(ttl_s=60, priority=0)
        assert (kept.session_id, kept.tokens, kept.priority, round(kept.ends_in_s)) == ("small", 4 * BLOCK, 0, 60)
        assert session.keep().priority == 50
        told = client.kept()
        assert (told.tokens, told.max_tokens) == (4 * BLOCK, 10 * BLOCK)
        ((one),) = told.kept
        assert (one.session_id, one.tokens, one.held_tokens, round(one.ends_in_s)) == ("small", 4 * BLOCK, BLOCK, 600)
        session.let_go()
        session.let_go()
        assert client.kept().tokens == 0

    await asyncio.to_thread(use)
    assert replicas.let_gone == ["5:ferry:session:small"]


async def test_a_prompt_that_is_kept_has_an_id_by_which_its_tenant_lets_it_go(running):
    clients, replicas = running
    await replicas.keeper.grant(Caller("ferry"), list(range(100)), None, [(70, 60.0)])

    def use():
        client, other = clients["ferry"], clients["harbour"]
        client.session("small").keep()
        prompt, session = sorted(client.kept().kept, key=lambda one: one.id)
        assert (prompt.session_id, prompt.tokens, session.session_id) == ("", 2 * BLOCK, "small")
        for kept in (prompt, session):
            with pytest.raises(NotFound, match="id: nothing is kept under"):
                other.let_go(kept.id)
            client.let_go(kept.id)
            with pytest.raises(NotFound, match="use an id that ListKept tells"):
                client.let_go(kept.id)
        assert client.kept().tokens == 0
        return prompt.id

    name = await asyncio.to_thread(use)
    assert replicas.let_gone == [f"5:ferry:{name}", "5:ferry:session:small"]


async def test_a_budget_is_refused_with_the_field_what_is_kept_and_what_may_be(running):
    client = running[0]["ferry"]

    def use():
        client.session("small").keep(ttl_s=40)
        with pytest.raises(OverLimit) as refused:
            client.session("second").keep()
        assert refused.value.field == "tenants.ferry.max_kept_tokens"
        assert str(refused.value) == (
            "tenants.ferry.max_kept_tokens: tenant 'ferry' keeps 128 tokens of at most 320; a context of 224 tokens does not "
            "fit beside them (fix: let something go (ListKept lists it), or have the limit raised)"
        )
        assert 30 < refused.value.retry_after_s <= 40
        with pytest.raises(InvalidInput, match="352 tokens are more than the 320 that tenant 'ferry' may keep"):
            client.session("large").keep()
        assert [kept.session_id for kept in client.kept().kept] == ["small"]

    await asyncio.to_thread(use)


async def test_what_another_tenant_keeps_is_not_seen_and_does_not_count(running):
    clients, _ = running

    def use():
        clients["ferry"].session("small").keep()
        harbour = clients["harbour"]
        assert harbour.kept().max_tokens == 75 * BLOCK, "three quarters of the half of 200 blocks"
        assert list(harbour.kept().kept) == []
        harbour.session("large").keep()
        assert (harbour.kept().tokens, clients["ferry"].kept().tokens) == (11 * BLOCK, 4 * BLOCK)

    await asyncio.to_thread(use)


async def test_wrong_sessions_times_and_priorities_are_named(running):
    client = running[0]["ferry"]

    def use():
        session = client.session("small")
        for field, how in (("ttl_s", {"ttl_s": 601}), ("ttl_s", {"ttl_s": -1}), ("priority", {"priority": 101})):
            with pytest.raises(InvalidInput) as refused:
                session.keep(**how)
            assert refused.value.field == field
        for call in (client.session("unknown").keep, client.session("unknown").let_go):
            with pytest.raises(NotFound, match="no session 'unknown'"):
                call()
        assert client.kept().tokens == 0

    await asyncio.to_thread(use)
