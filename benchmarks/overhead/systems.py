"""The systems that benchmarks.overhead compares: each is started as a whole, provides its surfaces, and is stopped as a whole.

Engines get the same arguments and environment everywhere; prefill computes on core 0, decode on core 1, the single
engine on both. Everything else (servers, proxies, router, Ray, the client) is not bound and shares the two cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.overhead.surfaces import Bare, Grpc, Http
from benchmarks.shared.load import Surface
from prefillshare.platform import engine_environment

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
KV_GIB = 0.5
#: Arguments of every engine.
ENGINE = {
    "dtype": "float32", "block_size": 32, "max_model_len": 2048, "max_num_seqs": 64, "max_num_batched_tokens": 2048,
    "enforce_eager": True, "generation_config": "vllm",
}
PREFILL_CORES, DECODE_CORES, BOTH_CORES = "0", "1", "0-1"


@dataclass(frozen=True)
class Started:
    """A running system. `roles`: pid -> name, for processes whose titles do not tell their role."""

    surfaces: dict[str, Surface]
    roles: dict[int, str]


def free_port() -> int:
    """A free port outside the ranges of the kernel and of Ray's workers, which might take it before the server does."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port between 20000 and 30000")


def environment(cores: str) -> dict[str, str]:
    return engine_environment() | {"VLLM_CPU_OMP_THREADS_BIND": cores, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}


@asynccontextmanager
async def bare(model: str) -> AsyncIterator[Started]:
    """One AsyncLLM in the client's process: no server, no connector, no second engine."""
    os.environ.update(environment(BOTH_CORES))
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, kv_cache_memory_bytes=int(2 * KV_GIB * 2**30), **ENGINE))
    try:
        yield Started({"in process": Bare(llm)}, {})
    finally:
        llm.shutdown()


@asynccontextmanager
async def stock_pd(model: str, server: str = "vllm.entrypoints.openai.api_server") -> AsyncIterator[Started]:
    """Two vLLM servers with the stock NIXL connector and scheduler, behind a minimal proxy."""
    processes: dict[str, subprocess.Popen] = {}
    urls = {}
    try:
        for name, role, cores in (("prefill server", "producer", PREFILL_CORES), ("decode server", "consumer", DECODE_CORES)):
            side_channel = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
            flags = ["--host", "127.0.0.1", *_flags(model, role)]
            processes[name], urls[name] = spawn(server, flags, environment(cores) | side_channel)
        targets = ["--prefill-url", urls["prefill server"], "--decode-url", urls["decode server"]]
        processes["proxy"], urls["proxy"] = spawn("benchmarks.overhead.stock_pd_proxy", targets, {})
        await healthy(urls.values(), processes)
        yield Started({"http": Http(urls["proxy"], "base")}, {p.pid: name for name, p in processes.items()})
    finally:
        stop(processes.values())


@asynccontextmanager
async def ours(model: str) -> AsyncIterator[Started]:
    """The whole system of a deployment file: Ray Serve, router, prefill and decode replica; gRPC and HTTP surfaces.

    The decoder is the base's own weights served as a decoder with full weights, so that no adapter slows it down.
    """
    from prefillshare.app import running
    from prefillshare.kvshare.config import parse

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _vouched_copy(model, folder)
        engines = {k: ENGINE[k] for k in ("max_num_seqs", "max_num_batched_tokens")} | {"kv_cache_gib": KV_GIB}
        ports = {"http_port": free_port(), "grpc_port": free_port()}
        deployment = parse({
            "base": {"model": model} | {k: ENGINE[k] for k in ("dtype", "block_size", "max_model_len")},
            "prefill": engines | {"cpu_cores": PREFILL_CORES},
            "decode": [{"pool": "decode", "model": str(folder), "name": "plain", "cpu_cores": DECODE_CORES} | engines],
            "router": ports | {"eager_prefill": False},  # the other systems prefill only what is asked for
            "cluster": {"start_timeout_s": START_TIMEOUT_S},
        })
        # Serve's synchronous calls refuse to run beside an event loop.
        system = running(deployment)
        await asyncio.to_thread(system.__enter__)
        try:
            grpc = Grpc(f"127.0.0.1:{ports['grpc_port']}", "plain")
            yield Started({"grpc": grpc, "http": Http(f"http://127.0.0.1:{ports['http_port']}", "plain")}, {})
        finally:
            await asyncio.to_thread(system.__exit__, None, None, None)


@asynccontextmanager
async def stock_pd_one_process(model: str) -> AsyncIterator[Started]:
    """As stock_pd, but with each engine's scheduler and model in one process, which is how ours run on CPUs."""
    async with stock_pd(model, "benchmarks.overhead.one_process_server") as started:
        yield started


#: In the order in which they run: ours between the two with which it is compared most, so that a drift of the machine shows.
SYSTEMS = {"bare": bare, "stock_pd": stock_pd, "ours": ours, "stock_pd_one_process": stock_pd_one_process}


def _vouched_copy(model: str, folder: Path) -> None:
    """A folder that is a decoder with the base's own weights: links to the base's files, and a contract."""
    from prefillshare.kvshare.contract import DecoderContract

    for file in Path(model).iterdir():
        (folder / file.name).symlink_to(file.resolve())
    DecoderContract.of_base(model).write(folder)


def spawn(module: str, flags: list[str], env: dict[str, str]) -> tuple[subprocess.Popen, str]:
    """Start a server of ours or of vLLM's on a free port; returns its process and its address."""
    port = free_port()
    command = [sys.executable, "-m", module, "--port", str(port), *flags]
    return subprocess.Popen(command, env=os.environ | env), f"http://127.0.0.1:{port}"


def _flags(model: str, role: str) -> list[str]:
    flags = ["--model", model, "--served-model-name", "base", "--kv-cache-memory-bytes", str(int(KV_GIB * 2**30))]
    for key, value in ENGINE.items():
        flags += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    connector = {"kv_connector": "NixlConnector", "kv_role": f"kv_{role}", "kv_buffer_device": "cpu"}
    return [*flags, "--kv-transfer-config", json.dumps(connector), "--disable-uvicorn-access-log"]


async def healthy(urls, processes: dict[str, subprocess.Popen]) -> None:
    """Wait until all servers answer. Raises RuntimeError if one ends, or TimeoutError."""
    deadline = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as client:
        for url in urls:
            while True:
                if ended := [name for name, p in processes.items() if p.poll() is not None]:
                    raise RuntimeError(f"{', '.join(ended)} ended while starting")
                try:
                    async with client.get(f"{url}/health") as answer:
                        if answer.status == 200:
                            break
                except (aiohttp.ClientError, TimeoutError):
                    pass
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{url} was not healthy within {START_TIMEOUT_S:g} s")
                await asyncio.sleep(0.5)


def stop(processes) -> None:
    """Ask the processes to end, and then end them."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)
