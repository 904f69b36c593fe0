"""What does one tenant's worst request cost the others?

    python -m benchmarks.neighbours [--seconds 20]

One prefill and one decode replica serve two tenants. The first takes small streamed chats, two at a time, without end. After
an undisturbed period the second sends one kind of request again and again, each as soon as the one before was answered: too
large, too many, or too expensive to compile. It runs in a process of its own, so that making its requests costs the measured
clients nothing but CPU time. Reported for each kind: the first tenant's 95th percentile of a whole chat beside that of the
undisturbed periods, and how the second was answered. There is an undisturbed period between any two kinds, and each kind is
compared with those around it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import httpx
from rich.console import Console

from benchmarks.shared import small
from benchmarks.shared.load import quantile
from benchmarks.shared.result import write
from benchmarks.shared.small import DECODERS, HTTP_PORT, MODEL
from prefillshare.app import running
from prefillshare.models import fetch
from prefillshare.seeded_adapters import make_seeded_adapters

KEYS = {"small": "psk-of-the-tenant-with-small-turns", "large": "psk-of-the-tenant-with-large-ones"}
AT_ONCE, TOKENS, TIMEOUT_S = 2, 16, 180.0
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASKED = [{"role": "user", "content": "Say something."}]


def kinds(number: int) -> Iterator[tuple[str, str, dict, dict]]:
    """(name, path, body, headers) of each kind. The `number`th request of a kind differs from its others, so that no kept
    verdict applies."""
    chat = {"model": DECODERS[0], "messages": ASKED, "max_tokens": TOKENS}
    prompt = {"model": DECODERS[0], "max_tokens": TOKENS}
    yield "n", COMPLETIONS, prompt | {"prompt": "a", "n": 16384}, {}
    yield "n within the limit", COMPLETIONS, prompt | {"prompt": "a", "n": 8, "temperature": 1}, {}
    yield "messages of 90 kB", CHAT, chat | {"messages": [{"role": "user", "content": "ab cd " * 15_000}] * 9}, {}
    yield "text near the limit", COMPLETIONS, prompt | {"prompt": "ab cd " * 12_000}, {}
    yield "/tokenize of 20 MB", "/tokenize", {"model": DECODERS[0], "prompt": "ab cd " * 3_500_000}, {}
    yield "3 million token ids", COMPLETIONS, prompt | {"prompt": [1] * 3_000_000}, {}
    yield "one-token prompts", COMPLETIONS, prompt | {"prompt": [[1]] * 150_000}, {}
    yield "headers of 2 MB", CHAT, chat, {f"x-{i}": "v" * 20_000 for i in range(100)}
    yield "wrong items", "/v1/responses", {"model": DECODERS[0], "input": [{"bogus": 1}] * 1000}, {}
    for name, pattern in (
        ("nested repetitions", "^(([a-z]{1,50}){1,50}){1,50}$"),
        ("nested empty repetitions", "((a{0,100}){0,100}){0,100}"),
        ("a long repetition", "[a-z]{1,3000}"),
    ):
        yield name, CHAT, chat | {"structured_outputs": {"regex": f"({pattern})|{number}"}}, {}
    schema = {"name": "x", "schema": _alternatives(8 if number % 2 else 6, number)}
    yield "nested oneOf", CHAT, chat | {"response_format": {"type": "json_schema", "json_schema": schema}}, {}


def _alternatives(depth: int, number: int) -> dict:
    if not depth:
        return {"type": "object", "properties": {f"p{number}": {"type": "string"}}}
    return {"oneOf": [_alternatives(depth - 1, number) for _ in range(3)]}


class Small:
    """The tenant with small turns. `took`: seconds of each whole chat that has ended since `reset`."""

    def __init__(self, client: httpx.AsyncClient):
        self._client = client
        self.reset()

    def reset(self) -> None:
        self.took: list[float] = []
        self.failed = 0

    async def chat(self, number: int) -> None:
        messages = [{"role": "user", "content": f"Tell me about number {number}."}]
        body = {"model": DECODERS[number % len(DECODERS)], "messages": messages, "max_tokens": TOKENS, "stream": True}
        began = time.monotonic()
        async with self._client.stream("POST", CHAT, json=body | {"ignore_eos": True}) as answer:
            async for _ in answer.aiter_lines():
                pass
        self.took.append(time.monotonic() - began)
        self.failed += answer.status_code != 200

    async def without_end(self, first: int) -> None:
        while True:
            await self.chat(first)
            first += AT_ONCE

    def figures(self) -> dict[str, float]:
        return {"chats": len(self.took), "p95_s": round(quantile(self.took, 0.95), 3), "failed": self.failed}


def send(kind: int, seconds: float) -> Counter[str]:
    """Send one kind of request for `seconds`; returns how it was answered. Runs in a process of its own."""

    async def sending() -> Counter[str]:
        async with client_of("large") as client:
            return await _send(client, kind, seconds)

    return asyncio.run(sending())


def client_of(tenant: str) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {KEYS[tenant]}"}
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{HTTP_PORT}", headers=headers, timeout=TIMEOUT_S)


async def _send(client: httpx.AsyncClient, kind: int, seconds: float) -> Counter[str]:
    answers: Counter[str] = Counter()
    ends, number = time.monotonic() + seconds, 0
    while (left := ends - time.monotonic()) > 0:
        _, path, body, headers = next(islice(kinds(number), kind, None))
        content = json.dumps(body)
        with suppress(TimeoutError):
            async with asyncio.timeout(left):
                try:
                    answer = await client.post(path, content=content, headers={"content-type": "application/json"} | headers)
                    answers[str(answer.status_code)] += 1
                except httpx.HTTPError as error:
                    answers[type(error).__name__] += 1
        number += 1
    return answers


async def measure(seconds: float, console: Console) -> tuple[list[dict], dict[str, dict]]:
    loop, apart = asyncio.get_running_loop(), ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with apart:
        async with client_of("small") as ours, asyncio.TaskGroup() as group:
            return await _measured(seconds, console, ours, group, partial(loop.run_in_executor, apart, send))


async def _measured(seconds: float, console: Console, ours, group, send) -> tuple[list[dict], dict[str, dict]]:
    tenant = Small(ours)
    chats = [group.create_task(tenant.without_end(number)) for number in range(AT_ONCE)]
    await asyncio.sleep(seconds)  # warm-up

    async def spell(work) -> tuple[dict, object]:
        tenant.reset()
        result = await work
        return tenant.figures(), result

    peace, found = [(await spell(asyncio.sleep(seconds)))[0]], {}
    for number, (name, *_) in enumerate(kinds(0)):
        figures, answers = await spell(send(number, seconds))
        peace.append((await spell(asyncio.sleep(seconds)))[0])
        usual = (peace[-1]["p95_s"] + peace[-2]["p95_s"]) / 2
        found[name] = figures | {"ratio": round(figures["p95_s"] / usual, 2), "answers": dict(answers)}
        console.print(name, found[name])
    for chat in chats:
        chat.cancel()
    return peace, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=20, help="length of each spell (default: 20)")
    args = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        model, keys = fetch(MODEL), Path(folder, "keys.yaml")
        keys.write_text(json.dumps({"tenants": {name: {"keys": [key]} for name, key in KEYS.items()}}))
        adapters = make_seeded_adapters(model, Path(folder), names=DECODERS)
        sizes = {"prefill": {"kv_cache_gib": 0.3}, "decode": {"kv_cache_gib": 0.3}}
        with running(small.deployment(model, adapters, router={"auth": {"keys_file": str(keys)}}, **sizes)):
            peace, found = asyncio.run(measure(args.seconds, console))
    headline = {"worst_ratio": max(figures["ratio"] for figures in found.values())}
    headline |= {name: figures["ratio"] for name, figures in found.items()}
    write("neighbours", console, vars(args), headline, peace=peace, kinds=found)


if __name__ == "__main__":
    main()
