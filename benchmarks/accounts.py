"""What do a tenant's accounts in Redis cost a turn?

    python -m benchmarks.accounts [--seconds 3]

No engine runs. Turns get a token each STEP_S and do with it what a router does: count it, and wait until the ledger has it.
That is measured with the ledger in memory and in a private Redis server on this machine, for growing numbers of turns at once:
how long a token waits, how much CPU time the router's process takes for it, and how many writes there are a second. Then the
limits are asked for one turn after the other. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from benchmarks.shared.load import quantile
from benchmarks.shared.redis_server import RedisServer
from benchmarks.shared.result import write
from prefillshare.kvshare.config import Router
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare.usage import TurnUsage
from prefillshare.router.accounts.accounts import Accounts
from prefillshare.router.accounts.limits import Charge
from prefillshare.router.accounts.redis_ledger import RedisLedger
from prefillshare.router.admission.grant import Demand, TenantShare

STEP_S, TURNS, ASKED = 0.03, (1, 16, 64, 256), 1000
PORT, BLOCK, KV_BYTES, PROMPT = 7797, 32, 23_040, 1000
LIMITED = TenantShare("acme", max_in_progress=100, tokens_per_minute=10**9, turns_per_minute=10**9)


async def tokens(accounts: Accounts, turns: int, seconds: float) -> dict[str, float]:
    """Run `turns` turns at once for so long; figures per token."""
    waited, steps = [], round(seconds / STEP_S)

    async def turn() -> None:
        usage = TurnUsage(prompt_tokens=PROMPT)
        account = accounts.of_turn("acme", "tools", usage, is_free=False)
        account.open(Charge(), PROMPT)
        with account.holding_kv(PROMPT):
            for step in range(steps):
                await asyncio.sleep(STEP_S)
                usage.completion_tokens += 1
                account.grew(PROMPT + step)
                began = time.perf_counter()
                await account.before_tokens_are_passed_on(last=step == steps - 1)
                waited.append(time.perf_counter() - began)
        account.close()

    writes, cpu, began = _writes(accounts), time.process_time(), time.perf_counter()
    await asyncio.gather(*(turn() for _ in range(turns)))
    cpu, took = time.process_time() - cpu, time.perf_counter() - began
    return {
        "tokens_per_s": round(len(waited) / took),
        "wait_ms_p50": round(1000 * quantile(waited, 0.5), 3),
        "wait_ms_p95": round(1000 * quantile(waited, 0.95), 3),
        "cpu_us_per_token": round(1e6 * cpu / len(waited)),
        "writes_per_s": round((_writes(accounts) - writes) / took),
    }


def _writes(accounts: Accounts) -> int:
    return accounts.ledger._number if isinstance(accounts.ledger, RedisLedger) else 0


async def limits(accounts: Accounts) -> dict[str, float]:
    """Take and settle one turn after the other; figures per turn. The end is not waited for by turns."""
    took, cpu = [], time.process_time()
    for _ in range(ASKED):
        began = time.perf_counter()
        charge = await accounts.limits.take(Demand("agents", PROMPT, tenant=LIMITED), 256)
        took.append(time.perf_counter() - began)
        charge.settle(PROMPT)
        await charge.settled()
    return {
        "take_ms_p50": round(1000 * quantile(took, 0.5), 3),
        "take_ms_p95": round(1000 * quantile(took, 0.95), 3),
        "cpu_us_per_turn": round(1e6 * (time.process_time() - cpu) / ASKED),
    }


async def measure(url: str, seconds: float, console: Console) -> tuple[list[dict], dict[str, dict]]:
    stores = {
        "memory": Accounts.in_memory(Metrics(CollectorRegistry()), BLOCK, KV_BYTES),
        "redis": Accounts.in_redis(Router(redis_url=url), Metrics(CollectorRegistry()), BLOCK, KV_BYTES),
    }
    rows, asked = [], {}
    for turns in TURNS:
        for name, accounts in stores.items():
            rows.append({"turns": turns, "ledger": name, **await tokens(accounts, turns, seconds)})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    for name, accounts in stores.items():
        asked[name] = await limits(accounts)
        console.print(f"limits in {name}: {asked[name]}")
        await accounts.close()
    return rows, asked


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=3, help="how long each number of turns runs")
    given, console = options.parse_args(), Console()
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder), PORT) as server:
        rows, asked = asyncio.run(measure(server.url, given.seconds, console))
    by_turns = {row["turns"]: row for row in rows if row["ledger"] == "redis"}
    headline = {
        "wait_ms_p50_one_turn": by_turns[1]["wait_ms_p50"],
        "wait_ms_p50_64_turns": by_turns[64]["wait_ms_p50"],
        "limits_ms_p50": asked["redis"]["take_ms_p50"],
    }
    write("accounts", console, {"step_s": STEP_S, "seconds": given.seconds}, headline, tokens=rows, limits=asked)


if __name__ == "__main__":
    main()
