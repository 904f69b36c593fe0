"""The systems that are compared. Each is started whole, on the same cores, with the same KV memory and the same adapters.

    prefillshare, icarus, droidspeak, none
            ours in that mode: a prefill engine on the first core, a decode engine on the second, half of the KV memory each;
            `none` is the per-model baseline, with adapters in both engines
    auto-prefillshare, always-prefillshare
            as prefillshare, but the router decides for each turn whether the decode engine makes the prompt's KV itself, or it
            always does
    unified-prefillshare, unified-icarus
            ours in that mode without a prefill pool: one engine on both cores, with all of the KV memory
    vllm    vLLM's own OpenAI server: one engine with a LoRA per agent and its own prefix cache, on both cores with all of the
            KV memory; scheduler and model in one process, as in ours
    With --spare-core, systems of one engine bind its computing to the second core; nothing else is bound.

All engines run with this project's plugin, so that vLLM's own server, too, gets its adapter kernels for CPUs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from benchmarks.agents.driver import Conversation, Ours, Stock
from benchmarks.overhead.systems import BOTH_CORES, environment, healthy, spawn, stop
from benchmarks.shared import small
from benchmarks.shared.cache_watch import CacheWatch
from benchmarks.shared.small import ADDRESS, BLOCK, HTTP_PORT
from prefillshare.app import running
from prefillshare.client import Client
from prefillshare.kvshare import metrics_text
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.contract import KVShape
from prefillshare.kvshare.modes import get_mode

RANK = 8
#: DroidSpeak: the layers that every decoder computes itself, of SmolLM2's 30.
OWN_LAYERS = "13-16"
TURN_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Budget:
    """`kv_gib`: KV memory of all engines of a system together. `one_engine_cores`: of systems with one engine."""

    kv_gib: float
    one_engine_cores: str = BOTH_CORES
    max_model_len: int = 2048


@dataclass(frozen=True)
class Running:
    """A started system. `converse`: context -> a conversation in which agent n is the n-th name. `counters`: what has been
    counted since the start, if the system reports it: "wanted_kv_mb" (what its caches would hold if they evicted nothing),
    "evicted_blocks", "preemptions", "tokens_prefilled_ahead". `client`: a client of systems with a prefill and a decode engine,
    whose costs can be measured."""

    converse: Callable[[list[int]], Conversation]
    counters: Callable[[], dict[str, int]]
    client: Client | None = None


def deployment(
    mode: str, model: Path, adapters: Mapping[str, Path], budget: Budget, local_prefill: str | None = None
) -> Deployment:
    """`local_prefill`: the decode pool's, if it is not the usual one."""
    size = {"kv_cache_gib": budget.kv_gib / 2}
    own: dict = {"local_prefill": local_prefill} if local_prefill else {}
    if not get_mode(mode).shares_prefill:
        own = {"prefill": {**size, "cpu_cores": "0"}}
    elif get_mode(mode).recomputes:
        own = {"own_layers": dict.fromkeys(adapters, OWN_LAYERS)}
    return small.deployment(
        model,
        adapters,
        prefill=size,
        decode={**size, "sharing": mode, "max_lora_rank": RANK, **own},
        router={"canary_share": 0.0},
        max_model_len=budget.max_model_len,
    )


def unified_deployment(mode: str, model: Path, adapters: Mapping[str, Path], budget: Budget) -> Deployment:
    return small.deployment(
        model,
        adapters,
        prefill={"replicas": 0},
        decode={
            "kv_cache_gib": budget.kv_gib,
            "cpu_cores": budget.one_engine_cores,
            "sharing": mode,
            "max_lora_rank": RANK,
            "local_prefill": "auto",
        },
        router={"canary_share": 0.0},
        max_model_len=budget.max_model_len,
    )


def ours(mode: str, of=deployment):
    """`of` makes the deployment."""

    def counters(caches: CacheWatch, block_mb: float) -> dict[str, int]:
        return {
            "wanted_kv_mb": round(sum(caches.wanted.values()) * block_mb),
            "evicted_blocks": sum(caches.evicted.values()),
            "tokens_prefilled_ahead": _prefilled_ahead(),
        }

    @contextmanager
    def start(model: Path, adapters: Mapping[str, Path], budget: Budget) -> Iterator[Running]:
        names = list(adapters)
        with (
            running(of(mode, model, adapters, budget)) as handle,
            Client(ADDRESS, timeout_s=TURN_TIMEOUT_S, retries=None) as client,
            CacheWatch(handle) as caches,
        ):
            yield Running(
                lambda context: Ours(client, names, context),
                lambda: counters(caches, BLOCK * KVShape.of(model).bytes_per_token("float32") / 1e6),
                client if of is deployment else None,
            )

    return start


def _prefilled_ahead() -> int:
    """Tokens of responses that were prefilled before the next turn asked for them, which no turn's usage includes."""
    text = httpx.get(f"http://127.0.0.1:{HTTP_PORT}/metrics", timeout=30).text
    return round(metrics_text.total(text, "prefillshare_eager_prefill_tokens_total"))


@contextmanager
def vllm(model: Path, adapters: Mapping[str, Path], budget: Budget) -> Iterator[Running]:
    names = list(adapters)
    flags = [
        "--host", "127.0.0.1", "--model", str(model), "--dtype", "float32", "--block-size", str(BLOCK), "--enforce-eager",
        "--max-model-len", str(budget.max_model_len), "--kv-cache-memory-bytes", str(int(budget.kv_gib * 2**30)),
        "--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
        "--generation-config", "vllm", "--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", str(len(names)),
        "--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items()),
    ]  # fmt: skip
    process, url = spawn("benchmarks.overhead.one_process_server", flags, environment(budget.one_engine_cores))
    try:
        asyncio.run(healthy([url], {"vLLM's server": process}))
        with httpx.Client(base_url=url, timeout=TURN_TIMEOUT_S, limits=httpx.Limits(max_connections=None)) as client:
            yield Running(lambda context: Stock(client, names, context), lambda: _counters(client))
    finally:
        stop([process])


def _counters(client: httpx.Client) -> dict[str, int]:
    text = client.get("/metrics").text
    return {"preemptions": round(metrics_text.total(text, "vllm:num_preemptions_total"))}


UNIFIED = {f"unified-{mode}": mode for mode in ("prefillshare", "icarus")}
#: Policy -> the system whose decode pool has it.
DECIDED = {"never": "prefillshare", "always": "always-prefillshare", "auto": "auto-prefillshare"}
#: In the order in which they run.
SYSTEMS = (
    {mode: ours(mode) for mode in ("prefillshare", "none", "icarus", "droidspeak")}
    | {DECIDED[policy]: ours("prefillshare", partial(deployment, local_prefill=policy)) for policy in ("always", "auto")}
    | {name: ours(mode, unified_deployment) for name, mode in UNIFIED.items()}
    | {"vllm": vllm}
)
BASELINES: Sequence[str] = ("none", "vllm")
