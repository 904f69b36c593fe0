"""The rules of ICaRus on real engines with a tiny model: what the caches hold, who may use it, and what is freed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from conftest import ids, wait_until
from engines import BLOCK, BLOCK_BYTES, LEASE_S, decoding, handed_over, nothing_held, settings_of, started, turn

from prefillshare.kvshare.errors import Internal, PrefixLost, ResumeReason
from prefillshare.proof.engines import new_id, sampling
from prefillshare.seeded_adapters import make_seeded_adapters

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

ADAPTERS = ("a", "b", "c", "d")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(tmp_path_factory, smollm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions go to the workers: `cached`
        settings = settings_of(tmp_path_factory.mktemp("icarus-rules"), smollm, "icarus", ADAPTERS)
        async with started(settings) as them:
            yield them


def cached(worker, blocks: list[int]) -> list[torch.Tensor]:
    """The content of these blocks of an engine's cache, layer by layer. Runs in the engine's worker."""
    layers = worker.model_runner.kv_caches
    total = worker.model_runner.kv_cache_config.num_blocks
    (dim,) = {layer.shape.index(total) for layer in layers}
    return [layer.index_select(dim, torch.tensor(blocks)).clone() for layer in layers]


async def contents(engine, blocks: list[int]) -> torch.Tensor:
    (layers,) = await engine._llm.collective_rpc(cached, args=(blocks,))
    return torch.stack(layers)


async def computed_by_the_base(engines, tokens: list[int], salt: str) -> torch.Tensor:
    """The base's KV of whole blocks. `salt`: not used before, so that none of it is cached."""
    prefill, decoder = engines
    result = await prefill.prefill(tokens, new_id(), cache_salt=salt)
    assert result.cached_tokens == 0
    (blocks,) = result.handoff.transfer["remote_block_ids"]
    seen = await contents(prefill, blocks)
    await decoder.release(result.handoff, new_id())
    return seen


async def lent(engines, prompt: list[int], n: int, adapter: str | None = "a"):
    """Take a turn that lends its KV; returns (tokens, the loan)."""
    tokens, _, chunk, _ = await turn(engines, prompt, n, adapter, lend=True)
    return tokens, chunk.lent


@pytest.mark.parametrize("adapter", [*ADAPTERS, None])
async def test_the_cache_of_a_decode_engine_holds_the_bases_kv_of_prompt_and_response(engines, adapter):
    prefill, decoder = engines
    prompt = ids(45, salt=1)
    tokens, loan = await lent(engines, prompt, 3 * BLOCK - 45 + 1, adapter)
    (blocks,) = loan.transfer["remote_block_ids"]
    got = await contents(decoder, blocks[:3])
    await prefill.release(loan, new_id())
    base = await computed_by_the_base(engines, (prompt + tokens)[: 3 * BLOCK], f"cache {adapter}")
    other = await computed_by_the_base(engines, ids(3 * BLOCK, salt=2), f"other {adapter}")
    assert got.shape == base.shape
    assert (got - base).abs().max() < 1e-4
    assert (got - other).abs().max() > 0.1


async def test_adapters_answer_differently(engines):
    answers = [tuple((await turn(engines, ids(45, salt=1), 20, adapter))[0]) for adapter in (*ADAPTERS, None)]
    assert len(set(answers)) == len(answers)


async def test_what_the_prefill_pool_pulled_is_what_it_would_have_computed(engines):
    prefill, decoder = engines
    prompt = ids(45, salt=3)
    tokens, loan = await lent(engines, prompt, 4 * BLOCK - 45 + 2)
    context = prompt + tokens
    result = await prefill.pull(context, loan, new_id())
    assert result.cached_tokens == len(context) - 1
    again = await prefill.prefill(context[: 4 * BLOCK + 1], new_id())
    assert again.computed_tokens == 1
    (blocks,) = again.handoff.transfer["remote_block_ids"]
    got = await contents(prefill, blocks[:4])
    await decoder.release(again.handoff, new_id())
    assert (got - await computed_by_the_base(engines, context[: 4 * BLOCK], "pulled")).abs().max() < 1e-4
    await nothing_held(*engines, timeout_s=LEASE_S / 2)


async def test_a_response_is_reused_by_every_adapter(engines):
    prompt = ids(40, salt=4)
    tokens, *_ = await turn(engines, prompt, 60, "a")
    for adapter in ("b", "c", None):
        _, _, chunk, _ = await turn(engines, prompt + tokens, 2, adapter)
        # 99 tokens have KV: three whole blocks are there, and a fourth with the other three tokens comes from the prefill pool.
        assert (chunk.local_tokens, chunk.kv_bytes) == (3 * BLOCK, BLOCK_BYTES)


async def test_preempted_requests_resume_from_base_kv_exactly(engines):
    prompts = [ids(100 + i, salt=10 + i) for i in range(5)]
    drawn = [{"temperature": 1.0, "seed": 5, "frequency_penalty": 0.7}, {"temperature": 0.8, "seed": 6, "top_p": 0.9}]
    options = [{}, {}, *drawn, {}]
    asked = list(zip(prompts, (*ADAPTERS, None), options, strict=True))
    alone = [await turn(engines, p, 90, a, **o) for p, a, o in asked]
    together = await asyncio.gather(*(turn(engines, p, 90, a, **o) for p, a, o in asked))
    assert not any(reasons for *_, reasons in alone)
    assert ResumeReason.PREEMPTED in [reason for *_, reasons in together for reason in reasons]
    for (want, want_lp, *_), (got, got_lp, *_) in zip(alone, together, strict=True):
        assert got == want
        assert max(abs(a - b) for a, b in zip(got_lp, want_lp, strict=True)) < 1e-3
    await nothing_held(*engines)


@pytest.mark.parametrize("done", [1, BLOCK - 8, BLOCK - 7, BLOCK - 6, 70])
async def test_a_turn_continues_elsewhere_with_the_same_tokens(engines, done):
    """No generated token is computed again: the prefix of the resumed request has all of its tokens except the last."""
    _, decoder = engines
    prompt, options = ids(40, salt=20 + done), {"temperature": 1.0, "seed": 11, "presence_penalty": 0.5}
    whole, *_ = await turn(engines, prompt, 80, "c", **options)
    handoff = await handed_over(engines, prompt, whole[:done])
    assert handoff.tokens == 40 + done - 1
    rest = []
    async for chunk in decoding(
        decoder, prompt + whole[:done], handoff, sampling(80, **options), new_id(), adapter="c", replay=done
    ):
        rest += chunk.token_ids
    assert whole[:done] + rest == whole


async def test_a_loan_that_nobody_reads_is_freed_when_it_is_given_back_or_ends(engines):
    prefill, decoder = engines
    for n in (1, 45):
        _, loan = await lent(engines, ids(n, salt=30), 20)
        assert decoder.stats().blocks_used > 0
        await prefill.release(loan, new_id())
        await nothing_held(decoder, timeout_s=LEASE_S / 2)
    await lent(engines, ids(45, salt=31), 20)
    await nothing_held(decoder, timeout_s=LEASE_S + 4)


async def test_a_loan_read_after_its_end_is_void(engines):
    prefill, decoder = engines
    prompt = ids(45, salt=32)
    tokens, loan = await lent(engines, prompt, 80)
    await asyncio.sleep(LEASE_S + 1)  # nothing to wait for: the lease must pass
    with pytest.raises(PrefixLost) as lost:
        await prefill.pull(prompt + tokens, loan, new_id())
    assert lost.value.reason == ResumeReason.KV_LOAD_FAILED
    await nothing_held(*engines)
    result = await prefill.prefill((prompt + tokens)[:-1], new_id())  # and nothing of it was kept
    assert result.cached_tokens <= 44
    await decoder.release(result.handoff, new_id())


async def test_a_loan_of_another_contract_is_refused_and_given_back(engines):
    prefill, decoder = engines
    prompt = ids(45, salt=33)
    tokens, loan = await lent(engines, prompt, 40)
    with pytest.raises(Internal, match="contract"):
        await prefill.pull(prompt + tokens, replace(loan, contract="two"), new_id())
    await nothing_held(decoder, timeout_s=LEASE_S / 2)


async def test_adapters_come_and_go_while_requests_run(engines, tmp_path, smollm):
    """A request whose adapter is unloaded ends with the tokens that it would have had; a new adapter answers at once."""
    _, decoder = engines
    prompt, before = ids(45, salt=50), dict(decoder.settings.adapters)
    whole, *_ = await turn(engines, prompt, 60, "d")
    other = make_seeded_adapters(Path(decoder.settings.model), tmp_path, names=("e",), modules=decoder.mode.adapter_modules)
    running = asyncio.create_task(turn(engines, prompt, 60, "d"))
    await asyncio.to_thread(wait_until, lambda: decoder.stats().running == 1, 5, 0.01)
    await decoder.set_adapters({name: before[name] for name in "abc"} | {"e": str(other["e"])})
    with pytest.raises(Internal, match="holds no adapter 'd'"):
        await turn(engines, prompt, 2, "d")
    new = await asyncio.gather(*(turn(engines, prompt, 20, name) for name in ("a", "b", "c", "e")))
    assert (await running)[0] == whole
    assert len({tuple(tokens) for tokens, *_ in new}) == 4
    await decoder.set_adapters(before)
    assert (await turn(engines, prompt, 60, "d"))[0] == whole
    await nothing_held(*engines)
