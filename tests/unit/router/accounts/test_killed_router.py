"""Two routers over one Redis. One, a process of its own, is killed while turns run; the ledger is exact nevertheless."""

import asyncio
import sys
from collections import Counter
from pathlib import Path

import pytest
from double import engines
from double.process import PROMPT, accounts_in
from double.system import system
from polling import PATIENCE_S

from prefillshare.kvshare.caller import Caller
from prefillshare.router.accounts.figures import Figures, total

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[3]
TURNS, PROMPT_TOKENS = 6, len(PROMPT) + 1


async def start_router(stores) -> asyncio.subprocess.Process:
    """A router's process, which takes TURNS turns that would not end."""
    arguments = (stores.url, stores.prefix, str(TURNS), "100000")
    code = f"import sys; sys.path[:0] = [{str(TESTS)!r}]; from double.process import run; run(*sys.argv[1:])"
    return await asyncio.create_subprocess_exec(sys.executable, "-c", code, *arguments, stdout=asyncio.subprocess.PIPE)


async def seen(process, at_least: int) -> Counter[int]:
    """Tokens that each turn's client has seen, once there are so many in all, or no more of them."""
    by_turn: Counter[int] = Counter()
    async with asyncio.timeout(PATIENCE_S):
        while by_turn.total() < at_least and (line := await process.stdout.readline()):
            by_turn[int(line)] += 1
    return by_turn


async def figures(stores) -> Figures:
    return total(row.figures for row in await stores.ledger().rows())


async def test_a_killed_routers_tokens_that_clients_have_seen_are_in_the_ledger_once(in_redis, monkeypatch):
    killed = await start_router(in_redis)
    try:
        by_turn = await seen(killed, 101)
    finally:
        killed.kill()
        await killed.wait()
    by_turn += await seen(killed, sys.maxsize)
    found = await figures(in_redis)
    # Beyond what clients have seen: the tokens that were written and not sent any more, at most one for each turn.
    assert by_turn.total() <= found.generated_tokens <= by_turn.total() + TURNS
    assert (found.turns, found.prompt_tokens) == (TURNS, TURNS * PROMPT_TOKENS)
    assert found.cached_tokens + found.computed_tokens == TURNS * (PROMPT_TOKENS - 1)
    assert found.kv_byte_seconds > 0

    monkeypatch.setattr(engines, "STEP_S", 0.001)
    async with system(accounts=accounts_in(in_redis.url, in_redis.prefix)) as other:
        for number in range(3):
            chunks = other.run("a", [*PROMPT, number], 5, Caller("acme"))
            assert [token async for chunk in chunks for token in chunk.token_ids] == other.expected("a", [*PROMPT, number], 5)
        more = (await figures(in_redis)).minus(found)
    assert (more.turns, more.prompt_tokens, more.generated_tokens) == (3, 3 * PROMPT_TOKENS, 15)
