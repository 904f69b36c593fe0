"""What it is worth to compute a decoder's own layers while the other layers' KV is still loading (DroidSpeak's pipelining).

A prefill engine serves two decode engines in turn, without a router. One begins when what enters its layers is there, if it
expects that to pay (kvshare_vllm/transfer/load_overlap.py); the other waits for all KV. One turn runs at a time, and times
count from the moment when the decode engine is asked.

Between two processes of one machine KV moves through shared memory, faster than any network. For a link of a given speed, the
engines run in a network namespace of their own, whose loopback is limited to it, and UCX uses TCP (needs root and iproute2).

    python -m benchmarks.droidspeak.overlap MODEL DECODER 13-16    (started by benchmarks.droidspeak)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.shared.children import events
from benchmarks.shared.small import BLOCK, VOCABULARY
from prefillshare.kvshare.contract import KVShape
from prefillshare.kvshare.decode_request import DecodeRequest
from prefillshare.kvshare.decoders import ecache_share
from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.platform import engine_environment

WAYS = {"overlapped": "pays", "one after another": "never"}
LIMIT_S = 1800.0
#: Limits loopback's rate; burst size and latency are enough for loopback's large segments.
SHAPE = "ip link set lo up && tc qdisc add dev lo root tbf rate {mbit}mbit burst 512kb latency 100ms && exec \"$@\""


def measured(
    model: Path, decoder: Path, group: LayerGroup, lengths: list[int], repeats: int, link_mbit: int | None, advance: Callable
) -> list[dict]:
    """`turns` in a process of its own, over a link of this speed (None: shared memory). Raises RuntimeError if that fails."""
    environment = [f"{name}={value}" for name, value in engine_environment().items()]
    command = ["env", *environment, sys.executable, "-m", __spec__.name, str(model), str(decoder), str(group)]
    command += ["--tokens", *map(str, lengths), "--repeats", str(repeats)]
    if link_mbit:
        if not links():
            raise RuntimeError("a slower link needs root, unshare, ip and tc (Debian: apt-get install iproute2)")
        command = ["unshare", "-n", "sh", "-c", SHAPE.format(mbit=link_mbit), "sh", "env", "UCX_TLS=tcp", *command]
    found = []
    for turn in events(command, LIMIT_S):
        advance()
        if turn["repeat"] >= 0:
            found.append(turn)
    return found


def links() -> bool:
    """Whether this machine lets us limit a link."""
    if not all(map(shutil.which, ("unshare", "ip", "tc"))):
        return False
    shaped = ["unshare", "-n", "sh", "-c", SHAPE.format(mbit=1000), "sh", "true"]
    return subprocess.run(shaped, capture_output=True, timeout=10).returncode == 0


async def turns(model: Path, decoder: Path, group: LayerGroup, lengths: list[int], repeats: int) -> AsyncIterator[dict]:
    """Yields, per length, repeat and way, the seconds until the loads had ended, and until the first token. Repeat -1 does not
    count: it shakes hands and lets the engine measure how long a step takes."""
    from vllm import SamplingParams

    from prefillshare.kvshare_vllm.engine.decode_engine import DecodeEngine
    from prefillshare.kvshare_vllm.engine.prefill_engine import PrefillEngine

    some, one = (SamplingParams(max_tokens=tokens, temperature=0.0) for tokens in (8, 1))
    prefill_settings = _settings(model, group, max(lengths))
    decode = replace(prefill_settings, role="decode", model=str(decoder), cpu_cores="1")
    async with AsyncExitStack() as stack:
        prefill = await PrefillEngine.start(prefill_settings)
        stack.callback(prefill.close)
        engines = {}
        for way, overlaps in WAYS.items():
            engines[way] = await DecodeEngine.start(replace(decode, pool=way, overlap_loads=overlaps))
            stack.callback(engines[way].close)
        for tokens in lengths:
            for repeat in range(-1, repeats):
                rng = random.Random(f"{tokens} {repeat}")
                prompt = [rng.randrange(VOCABULARY) for _ in range(tokens)]
                for way in sorted(engines, reverse=bool(repeat % 2)):
                    handoff = (await prefill.prefill(prompt[:-1], uuid.uuid4().hex)).handoff
                    began = time.perf_counter()
                    params = some if repeat < 0 else one
                    asked = DecodeRequest(uuid.uuid4().hex, prompt, handoff, params, own_layers=group)
                    stream = engines[way].decode(asked)
                    chunk, *_ = [chunk async for chunk in stream]
                    first = time.perf_counter() - began
                    times = {"load_s": chunk.load_s, "rest_load_s": chunk.rest_load_s, "first_token_s": first}
                    yield {"tokens": tokens, "repeat": repeat, "way": way} | times


def _settings(model: Path, group: LayerGroup, longest: int) -> EngineSettings:
    shape, kept = KVShape.of(str(model)), (group.transition,) if group.transition else ()
    token_bytes = shape.bytes_per_token("float32") * (1 + len(kept) * ecache_share(str(model), shape))
    return EngineSettings(
        role="prefill",
        pool="prefill",
        model=str(model),
        mode="droidspeak",
        contract="overlap",
        dtype="float32",
        max_model_len=longest + BLOCK,
        block_size=BLOCK,
        kv_cache_bytes=int(4 * (longest + BLOCK) * token_bytes),
        ecache_layers=kept,
        prefill_ecache_layers=kept,
        cpu_cores="0",
        max_num_seqs=4,
    )


def summary(found: list[dict]) -> dict[str, dict]:
    """Per length: medians by way, and the median over pairs of what overlapping took off the time to the first token."""
    summed: dict[str, dict] = {}
    for tokens in sorted({turn["tokens"] for turn in found}):
        of = {way: [turn for turn in found if (turn["tokens"], turn["way"]) == (tokens, way)] for way in WAYS}
        pairs = list(zip(*([turn["first_token_s"] for turn in of[way]] for way in WAYS), strict=True))
        times = ("load_s", "rest_load_s", "first_token_s")
        summed[str(tokens)] = {
            way: {what: round(statistics.median(turn[what] for turn in of[way]), 4) for what in times} for way in WAYS
        } | {
            "gain_s": round(statistics.median(waited - overlapped for overlapped, waited in pairs), 4),
            "speedup": round(statistics.median(waited / overlapped for overlapped, waited in pairs), 3),
        }
    return summed


def write_trace(found: list[dict], file: Path) -> None:
    """The last turn of each length and way, as Chrome trace events (chrome://tracing, Perfetto)."""
    last = {(turn["tokens"], turn["way"]): turn for turn in found}
    events: list[dict] = []
    for process, ((tokens, way), turn) in enumerate(last.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": f"{tokens} tokens, {way}"}})
        begins = turn["load_s"] if WAYS[way] == "pays" else turn["rest_load_s"]
        spans = [
            ("load what enters the own layers", 0.0, turn["load_s"]),
            ("load the other layers' KV", 0.0, turn["rest_load_s"]),
            ("own layers over the prompt, first token", begins, turn["first_token_s"]),
        ]
        for thread, (name, begin, end) in enumerate(spans):
            place = {"pid": process, "tid": thread, "ts": round(1e6 * begin), "dur": round(1e6 * (end - begin))}
            events.append({"ph": "X", "name": name, **place})
    file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, indent=1) + "\n")


async def _print(args: argparse.Namespace) -> None:
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to it
    async for turn in turns(args.model, args.decoder, LayerGroup.parse(args.layers), args.tokens, args.repeats):
        told.write(json.dumps(turn) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One turn at a time, with and without overlapped loads; a JSON object each.")
    parser.add_argument("model", type=Path, help="folder of the base")
    parser.add_argument("decoder", type=Path, help="folder of a fine-tune with all weights")
    parser.add_argument("layers", help="group that it computes itself, like 13-16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024], help="context lengths (default: 512 1024)")
    parser.add_argument("--repeats", type=int, default=3, help="contexts of each length (default: 3)")
    asyncio.run(_print(parser.parse_args()))
