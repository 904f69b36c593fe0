"""The golden path on the real small model: the oracle over gRPC."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from oracle import TOLERANCE
from transformers import AutoTokenizer

from prefillshare import demo
from prefillshare.finetuning import subjects
from prefillshare.finetuning.evaluate import offline_answers, served_answers
from prefillshare.finetuning.methods import METHODS
from prefillshare.finetuning.tasks import TASKS
from prefillshare.finetuning.transcripts import stop_ids
from smollm.conftest import ask

pytestmark = pytest.mark.engine

BLOCK = 32
QUESTIONS = (
    "Plan a small web shop.",
    "Write the first function.",
    "Which tools do you need?",
    "What is missing?",
    "Sum it up.",
)


def test_one_turn_is_exact_and_the_oracle_tells_sharing_from_own_prefill(running, oracle):
    result, prompt = oracle.turn(running.client.create_session(), "planner", messages=ask(QUESTIONS[0]), max_tokens=16)
    own = oracle.diff("planner", prompt, result.token_ids, result.logprobs, mode="none")
    assert own > 100 * TOLERANCE


def test_the_offline_evaluation_gives_the_served_answers(running, smollm):
    """So docs/accuracy.md scores what is served."""
    task = copy.copy(TASKS["bfcl_multiple"])
    task.max_tokens = 24
    questions, tokenizer = task.questions()[:2], AutoTokenizer.from_pretrained(smollm)
    adapter = Path(running.deployment.decode[0].adapters["planner"])
    subject = subjects.load("planner", smollm, adapter, METHODS["prefillshare"])
    offline = offline_answers(subject, task, questions, tokenizer, stop_ids=stop_ids(smollm, tokenizer))
    assert all(offline)
    assert served_answers(running.client, "planner", task, questions, at_once=2) == offline


def test_the_shipped_adapters_do_what_the_base_cannot(running, oracle):
    """In the demo's session, two trained decoders take turns over one context; the base is asked their first questions, too."""
    session, asked = running.client.create_session(messages=[{"role": "system", "content": demo.BRIEF}]), set()
    for turn in demo.TURNS:
        if turn.wanted is None:
            continue
        fork, what = session.fork(), {"messages": turn.messages, "temperature": 0.0}
        result, _ = oracle.turn(session, turn.decoder, **what, max_tokens=128)
        assert turn.is_right(result.text), result.text
        if turn.decoder not in asked:
            asked.add(turn.decoder)
            assert not turn.is_right(fork.turn("base", **what, max_tokens=64).text)
    assert asked == {"tools", "arithmetic"}


def test_five_turns_of_three_decoders_prefill_only_what_is_new(running, oracle):
    session = running.client.create_session()
    computed, new, known = 0, 0, 0
    for decoder, question in zip(("planner", "coder", "tools", "planner", "coder"), QUESTIONS, strict=True):
        result, prompt = oracle.turn(session, decoder, messages=ask(question), max_tokens=24)
        computed += result.usage.computed_tokens
        new += len(prompt) - known
        known = len(prompt)
        assert result.usage.cached_tokens + result.usage.computed_tokens == len(prompt) - 1
    assert computed <= 1.05 * new + 5 * BLOCK
    assert session.get().turns == 5


def test_a_suffix_is_seen_but_not_kept_and_a_fork_goes_its_own_way(running, oracle):
    session = running.client.create_session(text="The ferry leaves at nine. " * 8)
    hint = oracle.tokenizer.encode(" Answer in French.", add_special_tokens=False)
    first, prompt = oracle.turn(session, "planner", text=" Who is on board?", suffix_ids=hint, max_tokens=12, ignore_eos=True)
    assert prompt[-len(hint) :] == hint
    kept = list(session.get(with_token_ids=True).token_ids)
    assert kept == prompt[: -len(hint)] + first.token_ids
    fork = session.fork()
    ours, _ = oracle.turn(session, "coder", text=" And then?", max_tokens=12, ignore_eos=True)
    theirs, _ = oracle.turn(fork, "tools", text=" What was before?", max_tokens=12, ignore_eos=True)
    assert theirs.usage.computed_tokens < BLOCK + 12
    assert (
        list(session.get(with_token_ids=True).token_ids)[: len(kept)]
        == list(fork.get(with_token_ids=True).token_ids)[: len(kept)]
    )
    assert ours.token_ids != theirs.token_ids


def test_two_adapters_on_one_prompt_at_once_are_exact(running, oracle):
    sessions = {
        name: running.client.create_session(text="One harbour, two ships, three captains. " * 10)
        for name in ("planner", "coder")
    }
    oracle.base, oracle.decoder("planner"), oracle.decoder("coder")  # load models before the race

    def take(name):
        return oracle.turn(sessions[name], name, text=" Go on:", max_tokens=20, ignore_eos=True)[0]

    with ThreadPoolExecutor(2) as pool:
        planner, coder = pool.map(take, sessions)
    assert planner.token_ids != coder.token_ids


def test_the_base_itself_is_served_exactly(running, oracle):
    result, _ = oracle.turn(
        running.client.create_session(), "base", messages=ask("What is the capital of France?"), max_tokens=12
    )
    assert "Paris" in result.text


def test_stop_text_ends_the_response_before_it_and_seeds_repeat(running, oracle):
    turn = running.client.create_session().turn
    free = turn("base", text="One, two, three,", max_tokens=24, temperature=0.0)
    word = free.text.split()[2]
    session = running.client.create_session()
    stopped = session.turn("base", text="One, two, three,", max_tokens=24, stop=[word])
    kept = list(session.get(with_token_ids=True).token_ids)
    assert oracle.tokenizer.decode(kept) == f"One, two, three,{stopped.text}"  # the next decoder does not read what was cut
    assert session.turn("coder", text=" And?", max_tokens=2).usage.prompt_tokens == len(kept) + len(
        oracle.tokenizer.encode(" And?", add_special_tokens=False)
    )
    assert stopped.text == free.text[: free.text.index(word)]
    assert stopped.finish_reason == "stop"
    assert stopped.usage.total_s >= stopped.usage.time_to_first_token_s > 0
    seeded = [
        running.client.create_session().turn("base", text="A poem:", max_tokens=12, temperature=1.0, seed=s, ignore_eos=True)
        for s in (3, 3, 4)
    ]
    assert seeded[0].token_ids == seeded[1].token_ids != seeded[2].token_ids
