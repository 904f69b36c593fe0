"""The system with a tiny Qwen3: adapters, full weights and streams that share, per-model baselines, preemption, shutdown."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from conftest import System, ids, system, wait_until
from faults import disturbed, kill_busy
from oracle import TOLERANCE, Oracle

from prefillshare.app import running as run_deployment
from prefillshare.kvshare.config import parse
from prefillshare.kvshare.errors import ContractMismatch, EngineStartError, Overloaded
from prefillshare.kvshare.modes import get_mode
from prefillshare.seeded_adapters import make_seeded_adapters
from prefillshare.tiny_models import make_base, make_full_decoder

pytestmark = pytest.mark.engine

BLOCK = 32
MAX_LEN = 320
KIND = "qwen3"
#: Decoders with their own end of the prompt, longer than a block.
OWN_TOKENS = {"b": 40, "coder": 37}
#: 16 usable blocks of this model's KV: one longest sequence fits, two do not.
SMALL_GIB = 17 * BLOCK * 4 * 2 * 2 * 32 * 4 / 2**30


def deployment(folder, tokenizer) -> dict:
    base = make_base(KIND, folder / "base", tokenizer)
    adapters = make_seeded_adapters(base, folder / "adapters", names=("a", "b", "c", "d"), own_tokens=OWN_TOKENS)
    adapters |= make_seeded_adapters(base, folder / "streams", names=("s", "t"), modules=get_mode("icarus").adapter_modules)

    def files(names: str) -> dict[str, str]:
        return {name: str(adapters[name]) for name in names}

    full = make_full_decoder(base, folder / "full", seed=2, own_tokens=OWN_TOKENS["coder"])
    own = make_full_decoder(base, folder / "own", seed=3)
    small = {"kv_cache_gib": SMALL_GIB, "max_lora_rank": 8, "cpu_cores": "1"}
    return {
        "base": {
            "model": str(base),
            "dtype": "float32",
            "max_model_len": MAX_LEN,
            "block_size": BLOCK,
            "tool_call_parser": "hermes",
        },
        "prefill": {"kv_cache_gib": 8 * SMALL_GIB, "cpu_cores": "0"},
        "decode": [
            {"pool": "agents", "local_prefill": "never", "adapters": files("ab"), **small},
            {"pool": "coder", "model": str(full), **small},
            {
                "pool": "streams",
                "sharing": "icarus",
                "local_prefill": "never",
                "adapters": files("st"),
                "serve_base": False,
                **small,
                "kv_cache_gib": 4 * SMALL_GIB,
            },
            {"pool": "alone", "sharing": "none", "adapters": files("cd"), "serve_base": False, **small},
            {"pool": "solo", "sharing": "none", "model": str(own), **small},
        ],
        # Turns are admitted by their prompts' size only, so that they outgrow the pool and have to survive preemption.
        "router": {"expected_output_tokens": 1},
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm):
    with system(deployment(tmp_path_factory.mktemp(KIND), smollm)) as it:
        yield it


def test_every_kind_of_decoder_is_exact_over_turns_in_every_mode(running, oracle):
    session = running.client.create_session(token_ids=ids(45))
    for number, name in enumerate(("a", "coder", "s", "c", "b", "base", "solo", "t", "d", "coder")):
        oracle.turn(session, name, token_ids=ids(6, salt=number + 1), max_tokens=14, ignore_eos=True)


@pytest.mark.parametrize(("decoder", "pool"), [("c", "alone"), ("solo", "solo")])
def test_a_per_model_decoder_that_loses_its_only_replica_goes_on_with_the_same_tokens(running, oracle, decoder, pool):
    """The limit, the seed and the penalty count what was generated before as generated."""
    prompt = ids(70, salt=31)
    sampling = {"max_tokens": 40, "temperature": 0.9, "seed": 11, "presence_penalty": 0.6}
    whole = running.client.create_session().turn(decoder, token_ids=prompt, ignore_eos=True, **sampling)
    turn = disturbed(running, oracle, decoder, prompt, lambda: kill_busy(running, pool), **sampling)
    assert turn.usage.resumes >= 1
    assert turn.token_ids == whole.token_ids


def test_sharing_decoders_compute_a_prompt_once_and_per_model_ones_once_each(running, oracle):
    prompt = ids(4 * BLOCK + 2, salt=50)
    computed = {}
    for name in ("a", "b", "coder", "s", "c", "d", "solo"):
        result, _ = oracle.turn(running.client.create_session(), name, token_ids=prompt, max_tokens=2, ignore_eos=True)
        computed[name] = result.usage.computed_tokens
    def without(own_tokens: int) -> int:
        return (len(prompt) - own_tokens) % BLOCK

    first, later = len(prompt) - 1, without(1)
    shared = {"a": first, "b": without(OWN_TOKENS["b"]), "coder": without(OWN_TOKENS["coder"]), "s": later}
    assert computed == shared | {"c": first, "d": first, "solo": first}


@pytest.mark.parametrize("decoder", OWN_TOKENS)
@pytest.mark.parametrize("more", [-3, 0, 1, BLOCK, BLOCK + 1])
def test_prompts_around_the_length_of_an_own_end_are_exact(running, oracle, decoder, more):
    tokens = OWN_TOKENS[decoder] + more
    turn, prompt = oracle.turn(
        running.client.create_session(), decoder, token_ids=ids(tokens, salt=300 + tokens), max_tokens=6, ignore_eos=True
    )
    usage, own = turn.usage, min(tokens, OWN_TOKENS[decoder])
    assert (usage.own_tokens, usage.cached_tokens + usage.computed_tokens) == (own, tokens - own)
    assert oracle.diff(decoder, prompt, turn.token_ids, turn.logprobs, mode="none" if tokens == own else None) <= TOLERANCE
    if tokens > own:
        assert oracle.diff(decoder, prompt, turn.token_ids, turn.logprobs, mode="prefillshare") > TOLERANCE


def test_base_kv_of_an_own_end_is_there_for_the_next_turn(running, oracle):
    """Whoever takes it, and however long its own end is: the decoder's KV of these tokens is found by nobody, the base's by
    all, once it has been made ahead."""
    session, context = running.client.create_session(token_ids=ids(3 * BLOCK, salt=400)), 0
    for number, name in enumerate(("b", "a", "b", "coder", "s", "b", "a")):
        wait_until(lambda: running.stats()["prefill"]["running"] == 0)
        turn, prompt = oracle.turn(session, name, token_ids=ids(28, salt=410 + number), max_tokens=3, ignore_eos=True)
        own = OWN_TOKENS.get(name, 1)
        assert turn.usage.own_tokens == own
        assert turn.usage.cached_tokens >= min(context, len(prompt) - own) // BLOCK * BLOCK - BLOCK
        context = len(prompt) + 3


def together(oracle: Oracle, running: System, names: Sequence[str], salt: int, max_tokens: int) -> list:
    """Take one checked turn per name, each in a session of its own, all at once."""
    for name in set(names):
        oracle.decoder(name)

    def take(number: int):
        prompt = ids(100 + number, salt=salt + number)
        return oracle.turn(
            running.client.create_session(), names[number], token_ids=prompt, max_tokens=max_tokens, ignore_eos=True
        )[0]

    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(take, range(len(names))))


def test_streams_in_one_batch_are_exact(running, oracle):
    together(oracle, running, "stst", salt=40, max_tokens=24)


def test_preempted_turns_are_resumed_exactly_over_grpc(running, oracle):
    turns = together(oracle, running, ["coder"] * 5, salt=60, max_tokens=120)
    assert sum(turn.usage.resumes for turn in turns) >= 1
    assert all(turn.usage.completion_tokens == 120 for turn in turns)


def test_an_engine_that_holds_the_base_computes_preempted_turns_again_itself(running, oracle):
    before = running.stats()["agents"]["preemptions"]
    turns = together(oracle, running, "ababa", salt=70, max_tokens=120)
    assert running.stats()["agents"]["preemptions"] > before
    assert [turn.usage.resumes for turn in turns] == [0] * 5


def test_a_per_model_engine_recomputes_a_preempted_request_itself(running, oracle):
    turns = together(oracle, running, "cccc", salt=80, max_tokens=100)
    assert [turn.usage.resumes for turn in turns] == [0] * 4


def test_forced_calls_obey_their_schema_and_what_is_not_kept_leaves_the_next_turn_exact(running, oracle):
    """The model is random: only what engines are held to can make a call of what it says. A format leaves it free to say blanks
    for ever, which a bias keeps it from."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(running.deployment.base.model)
    blanks = {token: -100.0 for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()}
    properties = {"unit": {"enum": ["C", "F"]}, "on": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["unit", "on"], "additionalProperties": False}
    tools = [{"name": "set_heating", "parameters": schema, "strict": True}, {"name": "stop", "parameters": {"type": "object"}}]
    ask = [{"role": "user", "content": "Warmer!"}]
    session = running.client.create_session(token_ids=ids(45, salt=90))
    before = session.get().context_tokens
    for name in ("a", "s", "coder"):
        turn = session.turn(name, messages=ask, tools=tools, tool_choice="set_heating", max_tokens=120, logit_bias=blanks)
        (call,) = turn.tool_calls
        arguments = json.loads(call.arguments)
        assert (call.name, turn.finish_reason, turn.text) == ("set_heating", "tool_calls", "")
        assert (arguments.keys(), arguments["unit"] in "CF", type(arguments["on"])) == (properties.keys(), True, bool)
        session.update(truncate_to=before)
    choices = session.choices("b", text=" and", n=2, temperature=1.0, seed=7, max_tokens=12, choice=["warm", "cold"])
    assert {choice.text for choice in choices} <= {"warm", "cold"}
    assert (session.get().context_tokens, session.get().turns) == (before, 3)
    for name in ("a", "s", "coder"):
        oracle.turn(session, name, token_ids=ids(6, salt=91), max_tokens=10, ignore_eos=True)


def test_a_kept_prefix_outlives_other_sessions_grows_and_is_let_go(running, oracle):
    """The prefill pool's cache has room for 135 blocks; half of them may be kept."""

    def fill(salt: int) -> None:
        for number in range(16):
            prompt = ids(9 * BLOCK, salt=salt + number)
            running.client.create_session(token_ids=prompt).turn("a", text="x", max_tokens=1)

    def cached(session) -> int:
        """Of a turn on a fork."""
        return oracle.turn(session.fork(), "a", token_ids=[7], max_tokens=2, ignore_eos=True)[0].usage.cached_tokens

    kept, unkept = (running.client.create_session(token_ids=ids(4 * BLOCK + 5, salt=number)) for number in (200, 201))
    asked = kept.keep(ttl_s=120, priority=80)
    assert (asked.tokens, asked.priority) == (4 * BLOCK, 80)
    unkept.turn("a", text="x", max_tokens=1)
    wait_until(lambda: [one.held_tokens for one in running.client.kept().kept] == [4 * BLOCK])
    fill(300)
    assert (cached(kept), cached(unkept)) == (4 * BLOCK, 0)

    oracle.turn(kept, "a", token_ids=ids(BLOCK, salt=202), max_tokens=BLOCK, ignore_eos=True)
    wait_until(lambda: [one.held_tokens for one in running.client.kept().kept] == [6 * BLOCK])
    fill(400)
    assert cached(kept) == 6 * BLOCK
    told = running.client.kept()
    assert (told.tokens, told.max_tokens // BLOCK) == (6 * BLOCK, 67)
    figures = httpx.get(f"http://127.0.0.1:{running.deployment.router.http_port}/metrics").text
    assert 'prefillshare_kept_blocks{pool="prefill"} 6.0' in figures

    others = [running.client.create_session(token_ids=ids(9 * BLOCK + 5, salt=500 + number)) for number in range(7)]
    for session in others[:6]:
        session.keep()
    with pytest.raises(Overloaded, match=r"router\.max_kept_share: you keep 1920 tokens of at most 2144; a context of 288"):
        others[6].keep()
    for session in (kept, *others):
        session.let_go()
    fill(600)
    assert (cached(kept), running.client.kept().tokens) == (0, 0)


@pytest.fixture
def small(tmp_path, smollm):
    """A deployment of one pool, not started."""
    from ports import free_port

    data = deployment(tmp_path, smollm)
    return data | {"decode": data["decode"][:1], "router": {"http_port": free_port(), "grpc_port": free_port()}}


def test_stopping_finishes_running_turns_and_an_engine_that_cannot_start_says_why(small, running):
    """Runs last, since it ends this module's system first and uses its cluster."""
    import ray
    from ray import serve

    session, pieces = running.client.create_session(), []
    stream = session.stream("a", token_ids=ids(40, salt=99), max_tokens=150, ignore_eos=True)
    pieces.append(next(stream))
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    running.handle.drain.remote(30.0).result(timeout_s=40)
    reader.join(timeout=10)
    assert pieces[-1].done.usage.completion_tokens == 150

    serve.shutdown()
    assert ray.is_initialized()
    bad = small | {"decode": [small["decode"][0] | {"engine_args": {"max_logprobs": -7}}]}
    with pytest.raises(EngineStartError) as raised, run_deployment(parse(bad)):
        pass
    assert "the decode engine of pool 'agents'" in str(raised.value)
    assert "max_logprobs" in str(raised.value)


def test_a_decoder_of_another_base_is_refused_before_anything_starts(small, tmp_path):
    another = make_full_decoder(Path(small["base"]["model"]), tmp_path / "another", seed=5)
    other = make_seeded_adapters(another, tmp_path / "other", names=("x",))["x"]
    small["decode"][0]["adapters"] = {"x": str(other)}
    with pytest.raises(
        ContractMismatch,
        match=r"decode\.0\.adapters\.x: .*trained against a base whose weights is [0-9a-f]{64}.*has [0-9a-f]{64}",
    ), run_deployment(parse(small)):
        pass
