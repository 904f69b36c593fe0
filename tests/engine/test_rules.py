"""The rules of shared KV, on real engines with a tiny model: each rule is broken on purpose, or observed at work."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from conftest import ids, wait_until
from engines import BLOCK, BLOCK_BYTES, LEASE_S, decoding, handed_over, nothing_held, settings_of, started, turn
from safetensors.torch import load_file, save_file

from prefillshare.kvshare.errors import ContractMismatch, Internal, InvalidInput, PrefixLost, ResumeReason
from prefillshare.proof.engines import new_id, sampling

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(tmp_path_factory, smollm):
    decode = settings_of(tmp_path_factory.mktemp("rules"), smollm, "prefillshare", ("a", "b"))
    one = replace(decode, adapters={"a": decode.adapters["a"]})
    async with started(one, replace(decode, pool="stranger", contract="two", adapters={})) as them:
        await them[1].set_adapters(decode.adapters)  # "b" is added to an engine that started with one adapter
        yield them


async def test_a_prompt_without_a_handoff_is_refused_not_recomputed(engines):
    _, decoder, _ = engines
    with pytest.raises(Internal, match="R1"):
        async for _ in decoding(decoder, ids(40), None, sampling(4), new_id(), adapter="a"):
            pass


async def test_the_scheduler_itself_refuses_a_request_without_a_handoff(engines):
    """A request that bypasses our engine class gets an error, not the decoder's own prefill."""
    _, decoder, _ = engines
    reasons = []
    async for output in decoder._generate(ids(40), sampling(4), new_id(), "a", None):
        reasons.append((output.outputs[0].finish_reason, output.kv_transfer_params))
        assert not output.outputs[0].token_ids
    assert reasons == [("error", {"refused": "it came without a KV handoff (R1)"})]


async def test_blocks_a_decoder_made_are_never_offered(engines):
    first = ids(70, salt=1)
    tokens, *_ = await turn(engines, first, 60)
    _, _, chunk, _ = await turn(engines, [*first, *tokens, 5], 2)
    # 69 shared tokens fill two whole blocks; the 60 generated ones would have made it four.
    assert chunk.local_tokens == 64


async def test_second_adapter_reuses_the_first_ones_prompt_blocks(engines):
    prompt = ids(2 * BLOCK + 9, salt=2)
    _, _, first, _ = await turn(engines, prompt, 2, adapter="a")
    _, _, second, _ = await turn(engines, prompt, 2, adapter="b")
    assert (first.local_tokens, first.kv_bytes) == (0, 3 * BLOCK_BYTES)
    assert (second.local_tokens, second.kv_bytes) == (2 * BLOCK, BLOCK_BYTES)


async def test_two_adapters_at_once_load_a_prompt_once(engines):
    prompt = ids(3 * BLOCK + 1, salt=3)
    results = await asyncio.gather(turn(engines, prompt, 8, adapter="a"), turn(engines, prompt, 8, adapter="b"))
    assert sorted(chunk.local_tokens for _, _, chunk, _ in results) == [0, 3 * BLOCK]


async def test_an_adapter_that_has_come_later_shares_steps_with_those_that_were_there(engines):
    _, decoder, _ = engines
    streams = []
    for adapter in ("a", "b"):
        prompt = ids(40, salt=ord(adapter))
        handoff = await handed_over(engines, prompt)
        streams.append(decoding(decoder, prompt, handoff, sampling(200), new_id(), adapter=adapter))
        await anext(streams[-1])
    assert decoder.stats().running == 2  # the first has not ended
    for stream in streams:
        await stream.aclose()


async def test_an_adapter_that_cannot_be_loaded_leaves_the_others_as_they_are(engines, tmp_path):
    _, decoder, _ = engines
    prompt, served = ids(50, salt=50), {name: lora.lora_path for name, lora in decoder._adapters.loaded.items()}
    before = await turn(engines, prompt, 8, adapter="b")
    await decoder.set_adapters({**bad_copies(served["a"], tmp_path), **served})
    assert set(decoder.adapters) == {"a", "b"}
    assert decoder.adapter_problems == {
        "dora": "vLLM does not yet support DoRA.",
        "beyond": "the engine's model has no module for 1 of its weights, model.layers.9.self_attn.q_proj among them",
    }
    after = await turn(engines, prompt, 8, adapter="b")
    assert after[:2] == before[:2]
    await decoder.set_adapters(served)
    assert not decoder.adapter_problems


def bad_copies(folder: str, target: Path) -> dict[str, str]:
    """Two bad copies of a good adapter: one that vLLM refuses, and one for a layer that the base does not have, which vLLM
    silently drops."""
    dora, beyond = (shutil.copytree(folder, target / name) for name in ("dora", "beyond"))
    settings = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    weights = load_file(beyond / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    weights |= {name.format(9, letter): weights[name.format(0, letter)].clone() for letter in "AB"}
    save_file(weights, beyond / "adapter_model.safetensors")
    return {"dora": str(dora), "beyond": str(beyond)}


async def test_preempted_requests_resume_exactly_with_seed_and_penalties(engines):
    prompts = [ids(100 + i, salt=10 + i) for i in range(4)]
    options = [{}, {}, {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.7}, {"temperature": 0.8, "seed": 6, "top_p": 0.9}]
    alone = [await turn(engines, p, 90, **o) for p, o in zip(prompts, options, strict=True)]
    together = await asyncio.gather(*(turn(engines, p, 90, **o) for p, o in zip(prompts, options, strict=True)))
    assert not any(reasons for *_, reasons in alone)
    assert ResumeReason.PREEMPTED in [reason for *_, reasons in together for reason in reasons]
    for (want, want_lp, *_), (got, got_lp, *_) in zip(alone, together, strict=True):
        assert got == want
        assert max(abs(a - b) for a, b in zip(got_lp, want_lp, strict=True)) < 1e-3


async def test_a_turn_continues_elsewhere_with_the_same_tokens(engines):
    _, decoder, _ = engines
    prompt, options = ids(80, salt=20), {"temperature": 1.0, "seed": 11, "presence_penalty": 0.5}
    whole, *_ = await turn(engines, prompt, 40, **options)
    handoff = await handed_over(engines, prompt)
    rest = []
    async for chunk in decoding(
        decoder, prompt + whole[:15], handoff, sampling(40, **options), new_id(), adapter="a", replay=15
    ):
        rest += chunk.token_ids
    assert whole[:15] + rest == whole


async def test_a_long_seeded_replay_in_chunks_continues_with_the_same_tokens(engines):
    """The replay is longer than a step's budget; vLLM samples once per chunk, and those draws must not count."""
    _, decoder, _ = engines
    prompt, options = ids(40, salt=22), {"temperature": 1.0, "seed": 12}
    whole, *_ = await turn(engines, prompt, 170, **options)
    handoff = await handed_over(engines, prompt)
    rest = []
    async for chunk in decoding(
        decoder, prompt + whole[:150], handoff, sampling(170, **options), new_id(), adapter="a", replay=150
    ):
        rest += chunk.token_ids
    assert whole[:150] + rest == whole


async def test_a_resumed_grammar_continues_where_it_was(engines):
    from vllm.sampling_params import StructuredOutputsParams

    _, decoder, _ = engines
    prompt = ids(50, salt=23)
    schema = {"type": "object", "properties": {"n": {"type": "string", "minLength": 24, "maxLength": 30}}, "required": ["n"]}

    async def generate(tokens, replay):
        params = sampling(60, structured_outputs=StructuredOutputsParams(json=schema))
        params.ignore_eos = False
        handoff = await handed_over(engines, prompt)
        return [
            token
            async for chunk in decoding(decoder, prompt + tokens, handoff, params, new_id(), adapter="a", replay=replay)
            for token in chunk.token_ids
        ]

    whole = await generate([], 0)
    cut = len(whole) // 2
    assert cut > 3
    assert whole[:cut] + await generate(whole[:cut], cut) == whole


async def test_tokens_a_grammar_refuses_are_an_error_not_a_resume(engines):
    from vllm.sampling_params import StructuredOutputsParams

    prefill, decoder, _ = engines
    prompt = ids(50, salt=24)
    params = sampling(20, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    handoff = await handed_over(engines, prompt)
    with pytest.raises(InvalidInput, match="structured output"):
        async for _ in decoding(decoder, [*prompt, 5000, 5001], handoff, params, new_id(), adapter="a", replay=2):
            pass
    await nothing_held(prefill, decoder, timeout_s=LEASE_S + 4)


async def test_prompts_of_different_salts_share_nothing(engines):
    prefill, decoder, _ = engines
    prompt = ids(2 * BLOCK + 1, salt=25)
    seen = []
    for salt in ("one", "two", "one"):
        result = await prefill.prefill(prompt[:-1], new_id(), cache_salt=salt)
        chunks = [
            c async for c in decoding(decoder, prompt, result.handoff, sampling(1), new_id(), adapter="a", cache_salt=salt)
        ]
        seen.append((result.cached_tokens, chunks[-1].local_tokens))
    # A whole cached prompt still has its last block computed again at prefill.
    assert seen == [(0, 0), (0, 0), (BLOCK, 2 * BLOCK)]


async def test_resumed_tokens_are_the_decoders_even_if_cached_as_base_kv(engines):
    """A turn's response is in the cache as base KV once it is part of a later prompt; a resumed request must not use that."""
    _, decoder, _ = engines
    prompt = ids(40, salt=21)
    whole, logprobs, *_ = await turn(engines, prompt, 80)
    await turn(engines, prompt + whole, 2)  # now the response is base KV in the decode engine's cache
    handoff = await handed_over(engines, prompt)
    got, chunk = [], None
    async for chunk in decoding(decoder, prompt + whole[:70], handoff, sampling(80), new_id(), adapter="a", replay=70):
        got += chunk.logprobs.values[:, 0].tolist()
    assert chunk.local_tokens == BLOCK
    assert max(abs(a - b) for a, b in zip(got, logprobs[70:], strict=True)) < 1e-3


async def test_a_handoff_of_another_contract_is_refused_with_both_named(engines):
    prefill, _, stranger = engines
    handoff = (await prefill.prefill(ids(39), new_id())).handoff
    with pytest.raises(ContractMismatch, match=r"(?s)contract two.*under one"):
        async for _ in decoding(stranger, ids(40), handoff, sampling(2), new_id()):
            pass
    await stranger.release(handoff, new_id())


async def test_engines_of_different_contracts_do_not_shake_hands(engines):
    """The transport's own check holds even if the handoff is forged: not one byte moves."""
    prefill, _, stranger = engines
    handoff = (await prefill.prefill(ids(39, salt=30), new_id())).handoff
    with pytest.raises(PrefixLost) as lost:
        async for _ in decoding(stranger, ids(40, salt=30), replace(handoff, contract="two"), sampling(2), new_id()):
            pass
    assert lost.value.reason == ResumeReason.KV_LOAD_FAILED


async def test_a_read_after_the_lease_is_void(engines):
    prefill, decoder, _ = engines
    prompt = ids(70, salt=31)
    handoff = await handed_over(engines, prompt)
    await asyncio.sleep(LEASE_S + 1)  # nothing to wait for: the lease must pass
    with pytest.raises(PrefixLost) as lost:
        async for _ in decoding(decoder, prompt, handoff, sampling(2), new_id(), adapter="a"):
            pass
    assert lost.value.reason == ResumeReason.KV_LOAD_FAILED
    await nothing_held(prefill, decoder)
    tokens, *_ = await turn(engines, prompt, 3)  # and the void blocks were not offered to anybody
    assert len(tokens) == 3


async def test_a_released_handoff_frees_the_prefill_blocks_at_once(engines):
    prefill, decoder, _ = engines
    handoff = (await prefill.prefill(ids(90, salt=32), new_id())).handoff
    await asyncio.to_thread(wait_until, lambda: prefill.stats().blocks_used == 3, 2)
    await decoder.release(handoff, new_id())
    await nothing_held(prefill, timeout_s=LEASE_S / 2)


async def test_a_reader_that_leaves_frees_both_sides(engines):
    prefill, decoder, _ = engines
    prompt = ids(90, salt=33)
    handoff = await handed_over(engines, prompt)
    stream = decoding(decoder, prompt, handoff, sampling(200), new_id(), adapter="a")
    await anext(stream)
    assert decoder.stats().running == 1
    await stream.aclose()
    await nothing_held(prefill, decoder, timeout_s=LEASE_S / 2)


@pytest.mark.parametrize("n", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1])
async def test_prompts_around_block_edges_are_handed_over_whole(engines, n):
    _, decoder, _ = engines
    prompt = ids(n, salt=40 + n)
    handoff = await handed_over(engines, prompt)
    chunks = [chunk async for chunk in decoding(decoder, prompt, handoff, sampling(2), new_id(), adapter="a")]
    assert chunks[-1].kv_bytes == -(-(n - 1) // BLOCK) * BLOCK_BYTES
