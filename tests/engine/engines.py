"""Engines without a router: a prefill engine, decode engines, and a turn as the router takes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from conftest import wait_until

from prefillshare.kvshare.decode_request import DecodeRequest
from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.modes import get_mode
from prefillshare.proof import engines
from prefillshare.proof.engines import Pair
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

BLOCK = 32
MAX_LEN = 320
LEASE_S = 6
BLOCK_BYTES = BLOCK * 4 * 2 * 2 * 32 * 4
# 16 usable blocks: one longest sequence fits, two do not.
KV_BYTES = 17 * BLOCK_BYTES


def settings_of(folder: Path, smollm: Path, mode: str, adapters: Iterable[str], family: str = "llama") -> EngineSettings:
    """Settings of a decode engine whose tiny base and adapters are made here."""
    base = make_base(family, folder / "base", smollm)
    made = make_seeded_adapters(base, folder / "adapters", names=tuple(adapters), modules=get_mode(mode).adapter_modules)
    return EngineSettings(
        role="decode",
        pool="decode",
        model=str(base),
        mode=mode,
        contract="one",
        dtype="float32",
        max_model_len=MAX_LEN,
        block_size=BLOCK,
        kv_cache_bytes=KV_BYTES,
        adapters={name: str(path) for name, path in made.items()},
        max_lora_rank=8,
        lease_s=LEASE_S,
        cpu_cores="1",
        max_num_seqs=16,
        max_num_batched_tokens=64,
    )


@asynccontextmanager
async def started(decode: EngineSettings, *others: EngineSettings):
    """Start a prefill engine for `decode`, the decode engine itself, and the others."""
    prefill = replace(
        decode,
        role="prefill",
        pool="prefill",
        adapters={},
        cpu_cores="0",
        kv_cache_bytes=decode.kv_cache_bytes * 8,
        tensor_parallel_size=1,
    )
    async with engines.started(prefill, decode, *others) as running:
        yield tuple(running)


def decoding(decoder, token_ids: list[int], handoff, sampling, request_id: str, **asked) -> AsyncIterator[TokenChunk]:
    return decoder.decode(DecodeRequest(request_id, token_ids, handoff, sampling, **asked))


async def handed_over(running, prompt: list[int], generated: list[int] = []):  # noqa: B006
    """Prefill what the mode hands over; returns the handoff."""
    made = await Pair(*running[:2]).hand_over(prompt, generated)
    return made.handoff if made else None


async def turn(running, prompt: list[int], n: int, adapter: str | None = "a", *, own_layers: str | None = None, **how):
    """Take a turn, resumed as often as necessary. Returns (tokens, log-probabilities, last chunk, reasons of resumes)."""
    group = LayerGroup.parse(own_layers) if own_layers else None
    taken = await Pair(*running[:2]).take(prompt, n, adapter, group=group, **how)
    return taken.tokens, taken.logprobs, taken.last, taken.resumed


async def nothing_held(*running, timeout_s=15.0):
    def held():
        return [s for s in (e.stats() for e in running) if s.blocks_used or s.running or s.waiting]

    await asyncio.to_thread(wait_until, lambda: not held(), timeout_s)
