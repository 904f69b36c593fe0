"""Engines without a router: a prefill engine, decode engines, and a turn as the router takes it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from conftest import wait_until

from prefillshare.kvshare.decode_request import DecodeRequest
from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.errors import PrefixLost
from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.modes import get_mode
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
    from prefillshare.kvshare_vllm.engine.engine import DecodeEngine, PrefillEngine

    prefill = replace(
        decode,
        role="prefill",
        pool="prefill",
        adapters={},
        cpu_cores="0",
        kv_cache_bytes=decode.kv_cache_bytes * 8,
        tensor_parallel_size=1,
    )
    engines = [await PrefillEngine.start(prefill)]
    try:
        for settings in (decode, *others):
            engines.append(await DecodeEngine.start(settings))
        yield tuple(engines)
    finally:
        for engine in reversed(engines):
            engine.close()


def sampling(n: int, **kw):
    from vllm import SamplingParams

    return SamplingParams(max_tokens=n, ignore_eos=True, logprobs=0, **({"temperature": 0.0} | kw))


def decoding(decoder, token_ids: list[int], handoff, sampling, request_id: str, **asked) -> AsyncIterator[TokenChunk]:
    return decoder.decode(DecodeRequest(request_id, token_ids, handoff, sampling, **asked))


def new_id() -> str:
    return uuid.uuid4().hex


async def handed_over(engines, prompt: list[int], generated: list[int] = []):  # noqa: B006
    """Prefill the part of a prompt, and of the tokens generated after it, that the mode hands over; returns the handoff."""
    prefill, decoder, *_ = engines
    shared = (prompt + generated)[: decoder.mode.handoff_tokens(len(prompt), len(generated))]
    return (await prefill.prefill(shared, new_id())).handoff if shared else None


async def turn(
    engines, prompt: list[int], n: int, adapter: str | None = "a", *, lend: bool = False, own_layers: str | None = None, **kw
):
    """Take a turn, resumed as often as necessary. Returns (tokens, log-probabilities, last chunk, reasons of resumes)."""
    group = LayerGroup.parse(own_layers) if own_layers else None
    _, decoder, *_ = engines
    tokens, logprobs, chunk, reasons = [], [], None, []
    while True:
        handoff = await handed_over(engines, prompt, tokens)
        try:
            async for chunk in decoding(
                decoder,
                prompt + tokens,
                handoff,
                sampling(n, **kw),
                new_id(),
                adapter=adapter,
                replay=len(tokens),
                lend=lend,
                own_layers=group,
            ):
                tokens += chunk.token_ids
                logprobs += chunk.logprobs.values[:, 0].tolist()
            return tokens, logprobs, chunk, reasons
        except PrefixLost as lost:
            reasons.append(lost.reason)


async def nothing_held(*engines, timeout_s=15.0):
    def held():
        return [s for s in (e.stats() for e in engines) if s.blocks_used or s.running or s.waiting]

    await asyncio.to_thread(wait_until, lambda: not held(), timeout_s)
