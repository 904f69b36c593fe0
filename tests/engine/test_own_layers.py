"""DroidSpeak on real engines with a tiny Qwen3: the decoder's own layers over the base's hidden states, exact everywhere.
test_droidspeak.py has a Llama."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from conftest import ids, wait_until
from engines import (
    BLOCK,
    BLOCK_BYTES,
    KV_BYTES,
    LEASE_S,
    decoding,
    handed_over,
    nothing_held,
    settings_of,
    started,
    turn,
)
from peft import PeftModel

from benchmarks.shared.reference_models import TOLERANCE, load
from prefillshare import reference
from prefillshare.kvshare.errors import ResumeReason
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.proof.engines import new_id, sampling
from prefillshare.tiny_models import make_full_decoder

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

LAYERS = 4
#: Groups of four layers: at the beginning, at the end, in the middle, and only the first or the last layer.
GROUPS = ("0-1", "2-3", "1-2", "0-0", "3-3")


class Oracle:
    def __init__(self, settings, full: Path):
        self._base, self._full = load(settings.model), load(full)
        self._adapters = {n: PeftModel.from_pretrained(load(settings.model), f).eval() for n, f in settings.adapters.items()}

    def _model(self, decoder: str | None):
        return self._full if decoder == "full" else self._adapters.get(decoder, self._base)

    def own(self, decoder: str | None, prompt: list[int], tokens: list[int]) -> list[float]:
        """Log-probabilities over the decoder's own KV."""
        return reference.none(self._base, self._model(decoder), prompt, tokens)

    def diff(self, decoder: str | None, prompt: list[int], tokens: list[int], logprobs: list[float], group: str | None):
        model = self._model(decoder)
        return reference.max_abs_diff(logprobs, reference.droidspeak(self._base, model, prompt, tokens, group or ""))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory, smollm):
    """((prefill engine, decode engine of two adapters, decode engine of other weights that waits for all loads), oracle)."""
    folder = tmp_path_factory.mktemp("own-layers")
    kept = (1, 2, 3)
    adapters = replace(
        settings_of(folder, smollm, "droidspeak", ("a", "b"), "qwen3"),
        ecache_layers=kept,
        prefill_ecache_layers=kept,
        kv_cache_bytes=KV_BYTES * (LAYERS + len(kept)) // LAYERS,
        overlap_loads="always",
    )
    full = make_full_decoder(Path(adapters.model), folder / "full", seed=5)
    own = replace(adapters, model=str(full), adapters={}, ecache_layers=(2,), pool="own", overlap_loads="never")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a function goes to the workers: `delay_rests`
        async with started(adapters, own) as engines:
            yield engines, Oracle(adapters, full)


async def exact(running, prompt: list[int], n: int, decoder: str | None = "a", own_layers: str | None = "1-2", **kw):
    """Take a turn and check that it agrees with the reference. Returns (tokens, last chunk, reasons of resumes)."""
    (prefill, of_adapters, own), oracle = running
    engines = (prefill, own) if decoder == "full" else (prefill, of_adapters)
    adapter = None if decoder == "full" else decoder
    tokens, logprobs, chunk, reasons = await turn(engines, prompt, n, adapter, own_layers=own_layers, **kw)
    assert oracle.diff(decoder, prompt, tokens, logprobs, own_layers) <= TOLERANCE
    return tokens, chunk, reasons


def cores_of(worker) -> set[int]:
    """The cores on which the thread that runs the model may run. Runs in the engine's worker."""
    return os.sched_getaffinity(0)


async def test_each_engine_computes_on_its_own_core(running):
    """There are two cores, and the engines' settings name them."""
    (prefill, decoder, own), _ = running
    cores = [await engine._llm.collective_rpc(cores_of) for engine in (prefill, decoder, own)]
    assert cores == [[{0}], [{1}], [{1}]]


@pytest.mark.parametrize("group", GROUPS)
async def test_any_group_of_layers_is_the_decoders_own(running, group):
    await exact(running, ids(70, salt=GROUPS.index(group)), 12, "a", group)


async def test_weights_of_its_own_and_fewer_kept_layers_than_the_prefill_engine(running):
    for group in ("2-2", "2-3", "0-2"):
        await exact(running, ids(75, salt=10), 12, "full", group)


@pytest.mark.parametrize("n", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK + 1, 250])
async def test_prompts_of_all_lengths(running, n):
    await exact(running, ids(n, salt=20 + n), 6, "b", "1-2")


async def test_only_what_is_used_is_read(running):
    """There are four layers, and the inputs of three are kept."""
    for group, layers in (("1-2", 3), ("0-1", 2), ("3-3", 4), (None, 4)):
        _, chunk, _ = await exact(running, ids(2 * BLOCK + 1, salt=30 + layers), 2, "a", group)
        assert chunk.kv_bytes == 2 * BLOCK_BYTES * layers // LAYERS


async def test_the_next_turn_computes_only_what_is_new(running):
    """Its own blocks are in the cache for this decoder and this group, and for nobody else."""
    prompt = ids(70, salt=40)
    tokens, *_ = await exact(running, prompt, 40, "a", "1-2")
    context = prompt + tokens + ids(10, salt=41)
    for decoder, group, local in (("a", "1-2", 64), ("a", "1-2", 96), ("a", "2-2", 0), ("b", "1-2", 0), ("a", None, 0)):
        _, chunk, _ = await exact(running, context, 8, decoder, group)
        assert chunk.local_tokens == local


async def test_decoders_of_different_groups_are_exact_in_one_batch(running):
    """Some recompute long prompts in chunks while others decode."""
    asked = [("a", "1-2"), ("b", "2-3"), ("a", "0-1"), (None, None), ("b", "1-1"), ("a", None), ("b", "3-3")]
    await asyncio.gather(
        *(exact(running, ids(20 + 13 * n, salt=50 + n), 60 - 5 * n, name, group) for n, (name, group) in enumerate(asked))
    )


async def test_running_decodes_go_on_while_a_long_prompt_is_recomputed(running):
    """The engine takes at most 64 tokens per step."""
    (prefill, decoder, _), _ = running
    order: list[str] = []
    decodes = asyncio.Event()

    async def watched(name: str, prompt: list[int], n: int):
        handoff = await handed_over((prefill, decoder), prompt)
        group = LayerGroup(1, 2)
        async for chunk in decoding(decoder, prompt, handoff, sampling(n), new_id(), adapter="a", own_layers=group):
            order.extend(name for _ in chunk.token_ids)
            if len(order) >= 10:
                decodes.set()

    first = asyncio.create_task(watched("short", ids(40, salt=60), 120))
    await decodes.wait()
    await watched("long", ids(260, salt=61), 1)
    before = order.index("long")
    await first
    assert before - 10 >= 260 // 64, order


async def test_a_prefix_that_is_being_recomputed_is_waited_for(running):
    """Two requests at once need only one load and one recomputation."""
    prompt = ids(4 * BLOCK + 1, salt=70)
    both = await asyncio.gather(*(exact(running, prompt, 4, "a", "1-2") for _ in range(2)))
    assert sorted(chunk.local_tokens for _, chunk, _ in both) == [0, 4 * BLOCK]


async def test_preempted_requests_resume_exactly(running):
    prompts = [ids(100 + i, salt=80 + i) for i in range(5)]
    asked = list(zip(prompts, ("a", "b", "a", "b", "a"), ("1-2", "0-1", "2-3", "3-3", "1-2"), strict=True))
    together = await asyncio.gather(*(exact(running, p, 90, name, group) for p, name, group in asked))
    assert ResumeReason.PREEMPTED in [reason for *_, reasons in together for reason in reasons]


@pytest.mark.parametrize("done", [1, BLOCK - 8, BLOCK - 7, 50])
async def test_a_turn_continues_elsewhere_with_the_same_tokens(running, done):
    (prefill, decoder, _), _ = running
    prompt, options = ids(40, salt=90 + done), {"temperature": 1.0, "seed": 11, "presence_penalty": 0.5}
    whole, *_ = await turn((prefill, decoder), prompt, 60, "b", own_layers="1-2", **options)
    handoff, rest = await handed_over((prefill, decoder), prompt, whole[:done]), []
    async for chunk in decoding(
        decoder,
        prompt + whole[:done],
        handoff,
        sampling(60, **options),
        new_id(),
        adapter="b",
        replay=done,
        own_layers=LayerGroup(1, 2),
    ):
        rest += chunk.token_ids
    assert whole[:done] + rest == whole


async def test_nothing_is_held_after_turns_that_end_early(running):
    (prefill, decoder, own), _ = running

    async def left_after(delay: float, number: int):
        task = asyncio.create_task(turn((prefill, decoder), ids(280, salt=100 + number), 30, "a", own_layers="1-2"))
        await asyncio.sleep(delay)
        task.cancel()

    await asyncio.gather(*(left_after(0.05 * number, number) for number in range(8)))
    await nothing_held(prefill, decoder, own, timeout_s=LEASE_S + 4)


def delay_rests(worker, seconds: float, *, fail: int = 0) -> None:
    """Have loads of other layers' KV take `seconds`, after which the first `fail` of them fail. Runs in the engine's worker."""
    import time

    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group().connector_worker
    stock, began, to_fail = type(connector)._pop_done_transfers, {}, [fail]

    def pop_done_transfers(transfers):
        now = time.monotonic()
        rests = [name for name in transfers if name.endswith(" rest")]
        held = {name: transfers.pop(name) for name in rests if now - began.setdefault(name, now) < seconds}
        done, failed = stock(connector, transfers)
        transfers.update(held)
        failures = [name for name in done if name.endswith(" rest")][: to_fail[0]]
        to_fail[0] -= len(failures)
        return done, failed | set(failures)

    connector._pop_done_transfers = pop_done_transfers


@pytest_asyncio.fixture(loop_scope="module")
async def rests(running):
    """rests(seconds, fail=0): `delay_rests` in all decode engines until the test has ended."""
    (_, *decoders), _ = running

    async def set_delay(seconds: float, **kw):
        for decoder in decoders:
            await decoder._llm.collective_rpc(delay_rests, args=(seconds,), kwargs=kw)

    yield set_delay
    await set_delay(0)


async def test_layers_are_recomputed_while_other_layers_are_still_loading(running, rests):
    """The request's tokens run meanwhile. Before everything is there, nobody may find its blocks, and it yields nothing."""
    (_, decoder, _), _ = running
    await rests(1.5)
    prompt, began = ids(4 * BLOCK + 1, salt=110), asyncio.get_running_loop().time()
    first = asyncio.create_task(exact(running, prompt, 4, "a", "1-2"))
    await asyncio.to_thread(wait_until, lambda: decoder.stats().running == 1, 1.2, 0.01)
    other = asyncio.create_task(exact(running, prompt, 4, "a", "1-2"))
    await exact(running, ids(20, salt=111), 4, None, None)
    assert not first.done()
    assert asyncio.get_running_loop().time() - began < 1.5
    chunks = [chunk for _, chunk, _ in await asyncio.gather(first, other)]
    assert asyncio.get_running_loop().time() - began >= 1.5
    assert [chunk.local_tokens for chunk in chunks] == [0, 4 * BLOCK]
    assert 0 < chunks[0].load_s < 1.2
    assert chunks[0].rest_load_s >= 1.5
    assert (chunks[1].load_s, chunks[1].rest_load_s) == (0, 0)


@pytest.mark.parametrize(("decoder", "group"), [("a", "1-2"), ("a", "0-1"), ("full", "2-3"), ("full", "0-1")])
async def test_a_load_of_the_other_layers_that_fails_is_made_again(running, rests, decoder, group):
    """The load fails after the layers have been recomputed, and before that."""
    await rests(0.3, fail=1)
    _, _, reasons = await exact(running, ids(100, salt=112), 8, decoder, group)
    assert reasons == [ResumeReason.KV_LOAD_FAILED]
    _, chunk, _ = await exact(running, ids(100, salt=112), 8, decoder, group)
    assert chunk.local_tokens == 96


def fail_a_rest_without_room(worker) -> None:
    """For the next request: its first load ends when no block is free, and its rest fails when it may begin but has not begun.
    Runs in the engine's process, where `failed_in` then tells that request's status."""
    import sys

    from vllm.distributed.kv_transfer import get_kv_transfer_group

    frame = sys._getframe()
    while not hasattr(engine := frame.f_locals.get("self"), "scheduler"):  # find the engine core, which has called the worker
        frame = frame.f_back
    scheduler = engine.scheduler
    connector = get_kv_transfer_group().connector_worker
    stock, first, connector.failed_in = type(connector)._pop_done_transfers, [], ""

    def may_end(name: str) -> bool:
        if name in first:
            return scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
        return name.removesuffix(" rest") not in first or status() != "WAITING_FOR_REMOTE_KVS"

    def status() -> str:
        return scheduler.requests[first[0]].status.name

    def pop_done_transfers(transfers):
        first.extend(list(transfers)[: 1 - len(first)])
        held = {name: transfers.pop(name) for name in list(transfers) if not may_end(name)}
        done, failed = stock(connector, transfers)
        transfers.update(held)
        failures = {name for name in done if name == f"{first[0]} rest"} if not connector.failed_in else set()
        if failures:
            connector.failed_in = status()
        return done, failed | failures

    connector._pop_done_transfers = pop_done_transfers


def failed_in(worker) -> str:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().connector_worker.failed_in


async def test_a_rest_may_fail_while_its_request_has_no_room_to_begin(running, rests):
    """Besides the blocks that it loads into, it needs another one, which a running request takes first."""
    (prefill, decoder, _), _ = running
    await decoder._llm.collective_rpc(fail_a_rest_without_room)
    waits = asyncio.create_task(exact(running, ids(8 * BLOCK + 1, salt=140), 8, "a", "1-2"))
    await asyncio.to_thread(wait_until, lambda: decoder.stats().blocks_used == 8, 5, 0.01)
    _, _, reasons = await exact(running, ids(6 * BLOCK + 1, salt=141), 2 * BLOCK - 2, "b", "1-2")
    assert reasons == []
    _, _, reasons = await waits
    assert reasons == [ResumeReason.KV_LOAD_FAILED]
    assert await decoder._llm.collective_rpc(failed_in) == ["WAITING"]
    await rests(0)
    await nothing_held(prefill, decoder)


async def test_where_loads_are_waited_for_nothing_runs_before_they_have_ended(running, rests):
    (_, _, own), _ = running
    await rests(1.0)
    asked = asyncio.create_task(exact(running, ids(4 * BLOCK + 1, salt=116), 4, "full", "2-3"))
    await asyncio.sleep(0.7)
    assert own.stats().running == 0
    _, chunk, _ = await asked
    assert chunk.load_s < chunk.rest_load_s >= 1.0


async def test_blocks_are_kept_until_both_loads_have_ended(running, rests):
    """A request is given up while its rest is loading, and others would like its blocks."""
    (prefill, decoder, _), _ = running
    await rests(1.5)
    task = asyncio.create_task(turn((prefill, decoder), ids(280, salt=113), 8, "a", own_layers="1-2"))
    await asyncio.to_thread(wait_until, lambda: decoder.stats().running == 1, 1.2, 0.01)
    task.cancel()
    await asyncio.to_thread(wait_until, lambda: decoder.stats().running == 0, 0.5, 0.01)
    assert decoder.stats().blocks_used >= 9
    await asyncio.gather(*(exact(running, ids(150 + n, salt=114 + n), 30, "b", "2-3") for n in range(3)))
    await nothing_held(prefill, decoder)


async def test_running_requests_are_preempted_around_one_whose_rest_is_loading(running, rests):
    await rests(0.5)
    asked = [(ids(100 + n, salt=120 + n), ("a", "b")[n % 2], ("1-2", "0-1", "2-3")[n % 3]) for n in range(5)]
    await asyncio.gather(*(exact(running, prompt, 90, name, group) for prompt, name, group in asked))
    await nothing_held(*running[0])


@pytest.mark.parametrize("decoder", ["a", "full", None])
async def test_what_a_decoder_would_say_over_its_own_kv_is_kept_to_itself(running, decoder):
    (_, of_adapters, own), oracle = running
    engine, adapter = (own, None) if decoder == "full" else (of_adapters, decoder)
    prompt = ids(3 * BLOCK + 5, salt=130)
    for _ in range(2):
        told = await engine.own_next(prompt, adapter=adapter, top=20)
        token, logprob = next(iter(told.row(0).items()))
        assert oracle.own(decoder, prompt, [token]) == pytest.approx([logprob], abs=TOLERANCE)
        assert (told.ranks.tolist(), len(told.row(0))) == ([1], 20)
    _, chunk, _ = await exact(running, prompt, 6, decoder, "2-2")
    assert chunk.local_tokens == 0
