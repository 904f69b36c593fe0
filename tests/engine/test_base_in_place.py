"""One engine that makes base KV itself: exact without a handoff, over switches, in chunks, beside others, when preempted."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import pytest
import pytest_asyncio
from conftest import ids
from engines import BLOCK, decoding, nothing_held, settings_of
from peft import PeftModel

from benchmarks.shared.reference_models import TOLERANCE, load
from prefillshare import reference
from prefillshare.kvshare.errors import EngineStartError
from prefillshare.kvshare.keep import Keep
from prefillshare.kvshare.modes import modes
from prefillshare.kvshare_vllm.engine import engine as engine_module
from prefillshare.kvshare_vllm.engine.decode_engine import DecodeEngine
from prefillshare.proof.engines import new_id, sampling

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


async def test_an_engine_in_which_nobody_asks_the_hook_does_not_start(tmp_path, smollm, monkeypatch):
    stock = engine_module.engine_args
    monkeypatch.setattr(engine_module, "engine_args", lambda *of: stock(*of) | {"worker_cls": "broken_rows.Worker"})
    settings = replace(settings_of(tmp_path, smollm, "prefillshare", ("a",)), makes_base_kv=True)
    with pytest.raises(EngineStartError, match=r"rows of a shared prefix run with its adapter: .* models/base_rows\.py"):
        await DecodeEngine.start(settings)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["prefillshare", "icarus"])
async def running(request, tmp_path_factory, smollm):
    """(engine, what the reference says)"""
    settings = settings_of(tmp_path_factory.mktemp(request.param), smollm, request.param, ("a", "b"))
    base = load(settings.model)
    models = {name: PeftModel.from_pretrained(load(settings.model), path).eval() for name, path in settings.adapters.items()}
    function = getattr(reference, request.param)
    engine = await DecodeEngine.start(replace(settings, makes_base_kv=True))
    try:
        yield engine, lambda adapter, prompt, tokens, **own: function(base, models.get(adapter, base), prompt, tokens, **own)
    finally:
        engine.close()


async def turn(running, prompt: list[int], n: int, adapter: str | None, own: Mapping[str, int] = MappingProxyType({}), **how):
    """(tokens, tokens of the prompt that were found cached), exact. `own`: own_tokens, if the decoder has them."""
    engine, says = running
    tokens, logprobs, local = [], [], None
    async for chunk in decoding(engine, prompt, None, sampling(n, **how), new_id(), adapter=adapter, **own):
        tokens += chunk.token_ids
        logprobs += chunk.logprobs.values[:, 0].tolist()
        local = chunk.local_tokens if local is None else local
    assert len(tokens) == n
    assert reference.max_abs_diff(logprobs, says(adapter, prompt, tokens, **own)) <= TOLERANCE
    return tokens, local


#: Modes in which a decoder may compute more than a prompt's last token.
WITH_OWN_END = pytest.mark.parametrize("running", [mode.name for mode in modes() if mode.own_end], indirect=True)


@WITH_OWN_END
@pytest.mark.parametrize("n", [39, 40, 41, 100, 101, 170, 250])
@pytest.mark.parametrize("tokens", [40, 100])
async def test_an_own_end_is_exact_also_in_several_steps(running, n, tokens):
    """A step computes at most 64 tokens."""
    own, prompt = {"own_tokens": tokens}, ids(n, salt=n)
    await turn(running, prompt, 4, "a", own)
    _, local = await turn(running, prompt, 4, "b", own)
    assert local == max(0, n - tokens) // BLOCK * BLOCK
    await turn(running, prompt, 4, "a")


@WITH_OWN_END
async def test_own_ends_of_other_lengths_share_a_batch_and_preemptions(running):
    engine, lengths = running[0], (1, 40, 100, 7)
    before = engine.stats().preemptions
    asked = [(ids(110, salt=90 + n % 2), 110, "ab"[n % 2], {"own_tokens": tokens}) for n, tokens in enumerate(lengths)]
    await asyncio.gather(*(turn(running, *one) for one in asked))
    assert engine.stats().preemptions > before
    await nothing_held(engine)


@pytest.mark.parametrize("adapter", ["a", None])
@pytest.mark.parametrize("n", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1, 150])
async def test_prompts_of_all_lengths(running, n, adapter):
    await turn(running, ids(n, salt=n), 6, adapter)


async def test_a_context_goes_from_decoder_to_decoder(running):
    context = ids(40, salt=7)
    for adapter in ("a", "b", None, "a"):
        tokens, _ = await turn(running, context, 20, adapter)
        context = [*context, *tokens, 11]


async def test_adapters_and_the_base_in_one_batch(running):
    prompt = ids(70, salt=9)
    await asyncio.gather(*(turn(running, prompt, 24, adapter) for adapter in ("a", "b", None)))


async def test_preempted_requests_go_on_in_place(running):
    engine, _ = running
    before = engine.stats().preemptions
    await asyncio.gather(*(turn(running, ids(100, salt=20 + n), 110, "ab"[n % 2]) for n in range(4)))
    assert engine.stats().preemptions > before
    await nothing_held(engine)


async def test_seeded_requests_say_the_same_whether_preempted_or_not(running):
    engine, _ = running
    how = {"temperature": 1.0, "seed": 5}
    alone, _ = await turn(running, ids(100, salt=31), 110, "a", **how)
    before = engine.stats().preemptions
    several = await asyncio.gather(*(turn(running, ids(100, salt=31 + n), 110, "a", **how) for n in range(4)))
    assert engine.stats().preemptions > before
    assert several[0][0] == alone


async def filled(running) -> None:
    """Other prompts pass through all of the cache's 16 blocks."""
    for n in range(5):
        await turn(running, ids(150, salt=60 + n), 2, "ab"[n % 2])


async def test_what_is_kept_outlives_other_prompts_and_makes_way_for_requests(running):
    engine, _ = running
    kept, unkept, more = (ids(4 * BLOCK, salt=50 + n) for n in range(3))
    whole = ids(6 * BLOCK, salt=53)
    await engine.warm([*kept, 1], new_id(), keep=[Keep("kept", len(kept), 600, priority=1)])
    await turn(running, [*unkept, 1], 2, "a")
    await filled(running)
    assert [(await turn(running, [*one, 2], 2, "b"))[1] for one in (kept, unkept)] == [4 * BLOCK, 0]
    await engine.warm([*more, 1], new_id(), keep=[Keep("more", len(more), 600)])
    await engine.warm([*whole, 1], new_id(), keep=[Keep("whole", len(whole), 600)])
    await nothing_held(engine)  # 14 of the 16 blocks are kept, and count as free
    _, local = await turn(running, ids(9 * BLOCK + 10, salt=54), 6, "a")
    assert local == 0
    assert (await turn(running, [*kept, 3], 2, None))[1] == 4 * BLOCK, "what has a lower priority was given up for the turn"
    await engine.let_go(["kept", "more", "whole"])
    await filled(running)
    assert [(await turn(running, [*one, 4], 2, "a"))[1] for one in (kept, more)] == [0, 0]
