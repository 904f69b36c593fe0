"""A router over doubles in a process of its own, in real time, with accounts in Redis."""

import asyncio
from collections.abc import Callable

from double import engines
from double.system import KV_BYTES, system
from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare.config import Router
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.accounts.accounts import Accounts

PROMPT = list(range(20, 57))


def accounts_in(url: str, prefix: str) -> Callable[[Metrics], Accounts]:
    """What `system` makes its accounts with."""
    config = Router(redis_url=url, redis_prefix=prefix)
    return lambda metrics: Accounts.in_redis(config, metrics, engines.BLOCK, KV_BYTES)


def run(url: str, prefix: str, turns: str, tokens: str) -> None:
    """Take so many turns at once, for the tenant "acme"; print a turn's number for each token that its client has seen."""
    engines.STEP_S = 0.003
    asyncio.run(_run(accounts_in(url, prefix), int(turns), int(tokens)))


async def _run(accounts: Callable[[Metrics], Accounts], turns: int, tokens: int) -> None:
    async with system(accounts=accounts) as running:

        async def take(number: int) -> None:
            async for chunk in running.run("a", [*PROMPT, number], tokens, Caller("acme")):
                for _ in chunk.token_ids:
                    print(number, flush=True)

        await asyncio.gather(*map(take, range(turns)))
