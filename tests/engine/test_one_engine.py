"""A deployment without a prefill pool: decode engines make the base's KV themselves, exactly; and one comes and goes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from conftest import System, ids, system, wait_until
from faults import disturbed, kill, kill_busy, wait_whole
from oracle import Oracle

from prefillshare.apply import apply
from prefillshare.kvshare.config import Deployment, parse
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_held_after")]

BLOCK = 32
MAX_LEN = 512
#: Decoders with their own end of the prompt.
OWN_TOKENS = {"b": BLOCK + 8}
#: 24 usable blocks of this model's KV in each engine.
SMALL_GIB = 25 * BLOCK * 4 * 2 * 2 * 32 * 4 / 2**30


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm):
    folder = tmp_path_factory.mktemp("one-engine")
    base = make_base("llama", folder / "base", smollm)
    modules = ("q_proj", "o_proj", "up_proj")  # such as both modes serve
    made = make_seeded_adapters(base, folder / "adapters", ("a", "b", "s", "t"), modules=modules, own_tokens=OWN_TOKENS)
    adapters = {name: str(path) for name, path in made.items()}
    size = {"kv_cache_gib": SMALL_GIB, "max_lora_rank": 8}
    with system(
        {
            "base": {"model": str(base), "dtype": "float32", "max_model_len": MAX_LEN, "block_size": BLOCK},
            "prefill": {"replicas": 0},
            "decode": [
                {"pool": "agents", "replicas": 2, "cpu_cores": "0", "adapters": {n: adapters[n] for n in "ab"}, **size},
                {"pool": "streams", "sharing": "icarus", "cpu_cores": "1", "adapters": {n: adapters[n] for n in "st"}, **size},
            ],
            "router": {"wedged_after_s": 10, "expected_output_tokens": 1},
        }
    ) as it:
        yield it


def test_what_another_pool_has_cached_is_handed_over_by_it(running, oracle):
    """This module's first turns, so that nobody knows yet what a copy costs: it is tried."""
    copied = []
    for number in range(4):
        session = running.client.create_session(token_ids=ids(6 * BLOCK, salt=200 + number))
        first, _ = oracle.turn(session, "a", token_ids=ids(3, salt=1), max_tokens=2, ignore_eos=True)
        time.sleep(1)  # until the router has been told what is cached
        turn, _ = oracle.turn(session, "s", token_ids=ids(3, salt=2), max_tokens=4, ignore_eos=True)
        if turn.usage.prefill_choice == "copy: sooner":
            copied.append((first.usage, turn.usage))
    assert copied
    for first, usage in copied:
        assert usage.prefill_replica == first.decode_replica != usage.decode_replica
        assert usage.cached_tokens >= 6 * BLOCK
        assert usage.kv_bytes_transferred > 0


@pytest.mark.parametrize("tokens", [2, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 9, 3 * BLOCK])
@pytest.mark.parametrize("decoder", ["a", "b", "s"])
def test_prompts_around_block_boundaries_are_exact_and_move_no_kv(running, oracle, decoder, tokens):
    prompt = ids(tokens, salt=tokens + 100 * "abs".index(decoder))
    turn, _ = oracle.turn(running.client.create_session(), decoder, token_ids=prompt, max_tokens=4)
    usage, shared = turn.usage, max(0, tokens - OWN_TOKENS.get(decoder, 1))
    assert usage.prefill_choice == ("here: only" if shared >= BLOCK else "here: cached" if shared else "")
    assert (usage.kv_bytes_transferred, usage.cached_tokens + usage.computed_tokens) == (0, shared)
    assert usage.own_tokens == tokens - shared
    assert usage.prefill_replica == (usage.decode_replica if shared else "")


def test_a_session_goes_from_decoder_to_decoder_and_finds_its_prompt_in_place(running, oracle):
    """Eager prefill makes the response's base KV in the same pool. Decoders of another pool get it from there."""
    session = running.client.create_session(token_ids=ids(3 * BLOCK, salt=7))
    first, prompt = oracle.turn(session, "a", token_ids=ids(5, salt=8), max_tokens=40, ignore_eos=True)
    context = len(prompt) + len(first.token_ids)
    done = "prefillshare_eager_prefills_total"
    wait_until(lambda: _eager_prefills_done(running, done), 20)
    for number, decoder in enumerate(("b", "base", "a")):
        turn, prompt = oracle.turn(session, decoder, token_ids=ids(5, salt=9 + number), max_tokens=10, ignore_eos=True)
        assert turn.usage.decode_replica == first.usage.decode_replica
        if not number:
            assert turn.usage.cached_tokens >= (context - 1) // BLOCK * BLOCK - BLOCK
    oracle.turn(session, "s", token_ids=ids(5, salt=15), max_tokens=10, ignore_eos=True)


def _eager_prefills_done(running: System, name: str) -> bool:
    import httpx

    text = httpx.get(f"{running.http_url.removesuffix('/v1')}/metrics", timeout=30).text
    return any(line.startswith(name + '{outcome="done"}') and not line.endswith(" 0.0") for line in text.splitlines())


def test_a_response_of_two_streams_is_found_in_place_without_more_ado(running, oracle):
    session = running.client.create_session(token_ids=ids(2 * BLOCK, salt=20))
    first, prompt = oracle.turn(session, "s", token_ids=ids(5, salt=21), max_tokens=50, ignore_eos=True)
    context = len(prompt) + len(first.token_ids)
    second, _ = oracle.turn(session, "t", token_ids=ids(5, salt=22), max_tokens=6, ignore_eos=True)
    assert second.usage.cached_tokens >= (context - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("names", ["ababab", "ststs"])
def test_preempted_turns_are_computed_again_in_place(running, oracle, names):
    take_preempted_turns(running, oracle, names)


def take_preempted_turns(running: System, oracle: Oracle, names: str) -> None:
    """Turns of one pool, all at once, that do not fit into its engines together."""
    pool = oracle.served[names[0]].pool
    for name in set(names):
        oracle.decoder(name)

    def take(number: int):
        prompt = ids(100 + number, salt=30 + number)
        session = running.client.create_session()
        return oracle.turn(session, names[number], token_ids=prompt, max_tokens=200, ignore_eos=True)[0]

    before = running.stats()[pool]["preemptions"]
    with ThreadPoolExecutor(len(names)) as threads:
        turns = list(threads.map(take, range(len(names))))
    assert running.stats()[pool]["preemptions"] > before
    assert [turn.usage.resumes for turn in turns] == [0] * len(names)


def test_a_replica_that_dies_in_the_middle_loses_no_token(running, oracle):
    wait_whole(running, "agents")
    turn = disturbed(running, oracle, "a", ids(90, salt=40), lambda: kill_busy(running, "agents"), max_tokens=60)
    assert turn.usage.resumes >= 1
    assert len(turn.token_ids) == 60


@contextmanager
def prefill_pool_beside(running: System) -> Iterator[Callable[[str, str], None]]:
    """Yields a function that sets local_prefill of the two pools; at the first call a prefill pool joins them."""

    def set_policies(*policies: str) -> None:
        apply(with_pool(running, *policies))

    try:
        yield set_policies
    finally:
        apply(running.deployment)


def with_pool(running: System, *policies: str) -> Deployment:
    data = running.deployment.model_dump(mode="json", exclude_none=True)
    for pool, policy in zip(data["decode"], policies, strict=True):
        pool["local_prefill"] = policy
    return parse(data | {"prefill": {"replicas": 1, "kv_cache_gib": 4 * SMALL_GIB, "cpu_cores": "1"}})


def test_turns_are_exact_wherever_their_prompts_are_computed(running, oracle):
    """Within one session, with prompts that end before, on and after a block's boundary."""
    wait_whole(running)
    at_random, seen = random.Random(5), set()
    with prefill_pool_beside(running) as set_policies:
        session, context = None, MAX_LEN
        for policies in (("never", "always"), ("always", "never"), ("never", "never"), ("auto", "auto")):
            set_policies(*policies)
            for decoder in at_random.choices("abst", k=4):
                if context > MAX_LEN - 4 * BLOCK:
                    session, context = running.client.create_session(token_ids=ids(BLOCK, salt=300 + len(seen))), BLOCK
                new = -context % BLOCK + BLOCK + at_random.choice((-1, 0, 1))
                max_tokens = at_random.choice((1, 9, BLOCK))
                prompt = ids(new, salt=context)
                turn, _ = oracle.turn(session, decoder, token_ids=prompt, max_tokens=max_tokens, ignore_eos=True)
                context += new + max_tokens
                seen.add(turn.usage.prefill_choice)
        assert {"here: policy", "there: policy"} <= seen

        set_policies("never", "never")
        for names in ("ababab", "ststs"):
            take_preempted_turns(running, oracle, names)
        turn = disturbed(running, oracle, "a", ids(90, salt=310), lambda: kill_busy(running, "agents"), max_tokens=60)
        assert turn.usage.resumes >= 1

        [maker] = running.info()["prefill"]
        kill(running, "prefill", maker)
        session = running.client.create_session(token_ids=ids(2 * BLOCK, salt=311))
        turn, _ = oracle.turn(session, "b", token_ids=ids(BLOCK, salt=312), max_tokens=9, ignore_eos=True)
        assert turn.usage.prefill_choice == "here: unavailable"


def test_a_prefill_pool_comes_and_goes_while_turns_run(running, oracle):
    wait_whole(running)
    before = {name: set(replicas) for name, replicas in running.info().items()}
    there = with_pool(running, "never", "auto")
    gone = there.model_copy(update={"prefill": running.deployment.prefill})
    session = running.client.create_session(token_ids=ids(70, salt=50))
    with ThreadPoolExecutor(1) as threads:
        for deployment in (there, gone):
            changing = threads.submit(apply, deployment)
            seen, salt = set(), 51
            while not changing.done():
                turn, _ = oracle.turn(session, "ab"[salt % 2], token_ids=ids(2, salt=salt), max_tokens=2, ignore_eos=True)
                seen, salt = seen | {turn.usage.prefill_choice}, salt + 1
                if turn.usage.prompt_tokens > MAX_LEN - 40:
                    session = running.client.create_session(token_ids=ids(70, salt=salt))
            changing.result()
            assert seen <= {"here: only", "here: cached", "there: policy"}
            turn, _ = oracle.turn(session, "a", token_ids=ids(2, salt=99), max_tokens=2, ignore_eos=True)
            assert turn.usage.prefill_choice == ("there: policy" if deployment is there else "here: only")
            assert bool(turn.usage.kv_bytes_transferred or turn.usage.prefill_replica != turn.usage.decode_replica) is (
                deployment is there
            )
    assert {name: set(replicas) for name, replicas in running.info().items()} == before
