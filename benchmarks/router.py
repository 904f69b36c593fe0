"""What one placement costs: router logic alone, with simulated replicas and the real prefix index.

    python -m benchmarks.router [--prefill 64] [--decode 256] [--prefixes 100000] [--tokens 8192]

A placement is what the router does per turn: hash the prompt's blocks once, ask the index what admission needs to know,
choose a prefill and a decode replica, and book the load. KV events reach the index over ZMQ, as from engines. The whole process
is bound to one core. Sweeps show how the cost grows with replicas and with cached prefixes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import uvloop
import zmq
from rich.console import Console
from rich.progress import Progress

from benchmarks.shared.result import RESULTS, write
from benchmarks.shared.small import bars
from prefillshare.kvshare.replica_info import KVEvents, ReplicaInfo
from prefillshare.router.pools.cache_index import BlockKeys, CacheIndex
from prefillshare.router.pools.health import Health
from prefillshare.router.pools.placement import POLICIES
from prefillshare.router.pools.pool import Pool
from prefillshare.router.pools.replica import Replica

BLOCK = 32
VOCABULARY = 50_000
#: Tokens a turn adds to a cached prefix, share of turns whose prefix nobody holds, and placements in flight at once.
NEW_TOKENS, FRESH_SHARE, IN_FLIGHT = 200, 0.1, 256
SYNC_EVERY = 200


class SimulatedReplicas:
    """Takes the place of a ReplicaSet: replicas that are always there."""

    def __init__(self, name: str, count: int):
        self.name, self.joined = name, SimpleNamespace(listener=None)
        self.members = {
            f"{name}-{n:04d}": Replica(ReplicaInfo(f"{name}-{n:04d}", KVEvents("", None), 10_000, BLOCK, 64), Health())
            for n in range(count)
        }
        self._usable = list(self.members.values())

    def usable(self, without=()):
        return [r for r in self._usable if r.id not in without] if without else self._usable


class Publishers:
    """One ZMQ stream of KV events per replica, in vLLM's wire format."""

    def __init__(self, context: zmq.Context, names: list[str]):
        self._encode = msgspec.msgpack.Encoder().encode
        self._sockets, self.events, self._sequence = {}, {}, dict.fromkeys(names, 0)
        for name in names:
            socket = self._sockets[name] = context.socket(zmq.PUB)
            socket.set_hwm(0)
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            self.events[name] = KVEvents(f"tcp://127.0.0.1:{port}", None)

    def stored(self, name: str, tokens: list[int], first_hash: int) -> None:
        blocks = len(tokens) // BLOCK
        event = {
            "type": "BlockStored",
            "block_hashes": list(range(first_hash, first_hash + blocks)),
            "parent_block_hash": None,
            "token_ids": tokens,
            "block_size": BLOCK,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }
        payload = self._encode([0.0, [event], 0])
        self._sockets[name].send_multipart((b"", self._sequence[name].to_bytes(8, "big"), payload))
        self._sequence[name] += 1

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close(linger=0)


def prefix(number: int, tokens: int) -> list[int]:
    return np.random.default_rng(number).integers(0, VOCABULARY, tokens).tolist()


class Simulation:
    def __init__(self, prefill: int, decode: int, prefixes: int, tokens: int):
        self.prefixes, self.tokens = prefixes, tokens
        self._index = CacheIndex(BLOCK)
        weights = POLICIES["prefix_aware"]
        self._sets = [SimulatedReplicas("prefill", prefill), SimulatedReplicas("decode", decode)]
        self.prefill, self.decode = (Pool(s, self._index, w, wait_s=1) for s, w in zip(self._sets, weights, strict=True))
        self._publishers = Publishers(zmq.Context.instance(), [n for s in self._sets for n in s.members])

    async def fill(self, progress: Progress) -> None:
        """Every prefix is cached on one prefill replica, every fourth also on one decode replica."""
        for replicas in self._sets:
            for name in replicas.members:
                await self._index.add(replicas.name, name, self._publishers.events[name])
                await self._seen(replicas.name, name, [1] * BLOCK, 10**15, again=True)
        task = progress.add_task(f"caching {self.prefixes:,} prefixes", total=self.prefixes)
        for number in range(self.prefixes):
            tokens = prefix(number, self.tokens)
            for replicas in self._sets[: 1 if number % 4 else 2]:
                names = list(replicas.members)
                name = names[number % len(names)]
                self._publishers.stored(name, tokens, number * 10_000)
            if number % SYNC_EVERY == SYNC_EVERY - 1 or number == self.prefixes - 1:
                await self._seen("prefill", list(self._sets[0].members)[number % len(self._sets[0].members)], tokens)
                progress.update(task, completed=number + 1)

    async def _seen(self, pool: str, name: str, tokens: list[int], first_hash: int = 0, again: bool = False) -> None:
        """Wait until the index has caught up."""
        keys, deadline = BlockKeys(tokens, BLOCK), time.monotonic() + 60
        while self._index.overlaps(pool, keys).get(name) != len(tokens):
            if again:  # the subscription may not be established yet
                self._publishers.stored(name, tokens, first_hash)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the index has not seen what {name} stored")
            await asyncio.sleep(0.005)

    async def blocks_taken_in_per_s(self, prompts: int = 500) -> float:
        """Blocks per second that the index takes in, including the replicas' part: encoding and sending the events."""
        fresh = [prefix(2 * 10**9 + n, self.tokens) for n in range(prompts)]
        names, began = list(self._sets[0].members), time.perf_counter()
        for number, tokens in enumerate(fresh):
            self._publishers.stored(names[number % len(names)], tokens, 10**13 + number * 10_000)
        for number in range(prompts - len(names), prompts):
            await self._seen("prefill", names[number % len(names)], fresh[number])
        return round(prompts * self.tokens / BLOCK / (time.perf_counter() - began))

    async def measure(self, placements: int, seed: int = 0) -> dict[str, float]:
        rng = random.Random(seed)
        running: deque = deque()
        latencies, found = [], 0
        for _ in range(placements):
            fresh = rng.random() < FRESH_SHARE
            prompt = prefix(rng.randrange(self.prefixes) + (10**9 if fresh else 0), self.tokens) + [7] * NEW_TOKENS
            start = time.perf_counter()  # a prompt comes fresh from the tokenizer
            keys = BlockKeys(prompt, BLOCK)
            self.prefill.overlaps(keys)  # for admission
            first = await self.prefill.choose(len(prompt), keys)
            second = await self.decode.choose(len(prompt), keys)
            first.replica.queued_tokens += first.missing_tokens
            second.replica.active += 1
            running.append((first, second))
            if len(running) > IN_FLIGHT:
                done, decoded = running.popleft()
                done.replica.queued_tokens -= done.missing_tokens
                decoded.replica.active -= 1
            latencies.append(time.perf_counter() - start)
            found += first.cached_tokens > 0
        latencies.sort()
        return {
            "placements_per_s": round(placements / sum(latencies), 1),
            "p50_ms": round(1e3 * latencies[placements // 2], 3),
            "p99_ms": round(1e3 * latencies[int(placements * 0.99)], 3),
            "found_share": round(found / placements, 3),
        }

    async def close(self) -> None:
        self._publishers.close()
        await self._index.close()


async def run(args, console: Console) -> dict:
    sweeps = {"replicas": [], "prefixes": []}
    with bars(console) as progress:

        async def point(prefill: int, decode: int, prefixes: int) -> dict:
            simulation = Simulation(prefill, decode, prefixes, args.tokens)
            try:
                await simulation.fill(progress)
                await simulation.measure(args.placements // 4, seed=1)  # warm-up
                figures = await simulation.measure(args.placements)
                figures["blocks_taken_in_per_s"] = await simulation.blocks_taken_in_per_s()
            finally:
                await simulation.close()
            console.print(f"{prefill} prefill, {decode} decode replicas, {prefixes:,} prefixes: {figures}")
            return {"prefill": prefill, "decode": decode, "prefixes": prefixes} | figures

        few = min(1000, args.prefixes)
        for scale in (1, 4, 16, 64):
            if args.prefill >= scale:
                sweeps["replicas"].append(await point(args.prefill // scale, max(1, args.decode // scale), few))
        for prefixes in [n for n in (1000, 10_000, 100_000, 1_000_000) if n < args.prefixes] + [args.prefixes]:
            sweeps["prefixes"].append(await point(args.prefill, args.decode, prefixes))
    return sweeps


def plot(sweeps: dict, tokens: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, sweep, key, label in (
        (left, sorted(sweeps["replicas"], key=lambda p: p["prefill"]), "prefill", "prefill replicas (4 decode each)"),
        (right, sweeps["prefixes"], "prefixes", "cached prefixes"),
    ):
        for figure_name in ("p50_ms", "p99_ms"):
            label_of = figure_name.replace("_", ", ")
            axes.plot([p[key] for p in sweep], [p[figure_name] for p in sweep], marker="o", label=label_of)
        axes.set(xscale="log", xlabel=label, ylabel="placement, ms", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"One placement (two pools, prompts of {tokens:,} tokens) on one core")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--prefill", type=int, default=64, help="prefill replicas (default: 64)")
    parser.add_argument("--decode", type=int, default=256, help="decode replicas (default: 256)")
    parser.add_argument("--prefixes", type=int, default=100_000, help="cached prefixes (default: 100000)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per prefix (default: 8192)")
    parser.add_argument("--placements", type=int, default=4000, help="placements measured per point (default: 4000)")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    console = Console(stderr=True)
    sweeps = uvloop.run(run(args, console))  # as in a Ray actor
    config = vars(args) | {"block_size": BLOCK, "new_tokens": NEW_TOKENS, "fresh_share": FRESH_SHARE, "cores_used": 1}
    memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    write("router", console, config, sweeps["prefixes"][-1], sweeps=sweeps, peak_memory_gib=memory)
    plot(sweeps, args.tokens, RESULTS / "router.png")


if __name__ == "__main__":
    main()
