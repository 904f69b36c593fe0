"""What happens to keeping while Redis is away: who asks for it is told, turns go on, and what was kept is there afterwards."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext

import pytest
from prometheus_client import CollectorRegistry

from prefillshare.kvshare.caller import ANONYMOUS
from prefillshare.kvshare.config import Base, Router
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.kept.budgets import Budgets
from prefillshare.router.kept.keeper import PATIENCE_S, Keeper
from prefillshare.router.kept.kept import of_session
from prefillshare.router.kept.lifecycle import open_kept
from prefillshare.router.kept.redis import CALL_S
from prefillshare.router.tenants import Tenants

PROMPT = list(range(100))


class NoReplicas:
    """In the place of Holding and Upkeep."""

    def __init__(self):
        self.wanted = []

    def check(self) -> None: ...

    def hold(self, wanted) -> None:
        self.wanted.append(wanted)

    def turn(self, key):
        return nullcontext()

    def keeps(self, tenant) -> None: ...

    def may_keep(self, tenant) -> bool:
        return True

    def held_tokens(self, kept) -> int:
        return 0

    async def stop(self) -> None: ...


@pytest.fixture
async def made(own_redis_server):
    """(server, keeper, replicas)"""
    server, replicas, base = own_redis_server(), NoReplicas(), Base(model="m", block_size=8)
    budgets = Budgets(Router(), 8, Tenants(), lambda: 100)
    store = open_kept(Router(redis_url=server.url))
    keeper = Keeper(store, budgets, replicas, replicas, base, Metrics(CollectorRegistry()))
    yield server, keeper, replicas
    await keeper.stop()


async def test_who_keeps_a_session_is_told_that_the_store_is_away(made):
    server, keeper, _ = made
    await keeper.keep_session(ANONYMOUS, "s", PROMPT, None, 60, None)
    server.kill()
    for call in (
        keeper.keep_session(ANONYMOUS, "t", PROMPT, None, 60, None),
        keeper.let_go("", of_session("s")),
        keeper.listed(""),
    ):
        began = time.monotonic()
        with pytest.raises(Unavailable, match="the store of kept contexts: "):
            await call
        assert time.monotonic() - began < 2 * CALL_S


async def test_calls_go_on_without_being_kept(made):
    server, keeper, _ = made
    server.kill()
    began = time.monotonic()
    assert await keeper.grant(ANONYMOUS, PROMPT, None, [(40, 300.0), (90, 300.0)]) == []
    assert time.monotonic() - began < 2 * PATIENCE_S


async def test_a_session_that_goes_on_meanwhile_is_not_prolonged_and_no_turn_fails(made):
    server, keeper, replicas = made
    await keeper.keep_session(ANONYMOUS, "s", PROMPT, None, 60, None)
    replicas.wanted.clear()
    server.kill()
    keeper.went_on("", "s", lambda: [*PROMPT, 1], None)
    await asyncio.sleep(0)
    await asyncio.wait(set(keeper._background._running))
    assert replicas.wanted == []
