"""The process that compiles: it says what is cheap and held, and what is not ends in time and alone."""

import asyncio
import json

import pytest
import xgrammar

from prefillshare.kvshare_vllm.grammars.client import TOO_MUCH_CPU, GrammarClient

pytestmark = pytest.mark.slow

#: Bytes, some letters in a row, and an end.
VOCABULARY = [bytes([n]) for n in range(256)] + [b"a" * n for n in range(2, 17)] + [b"</s>"]


def tokenizer_info() -> str:
    info = xgrammar.TokenizerInfo(VOCABULARY, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[len(VOCABULARY) - 1])
    return info.serialize_json()


CHEAP = [
    ("regex", r"[a-z0-9]{1,8}@[a-z]{1,8}\.(com|org)"),
    ("json", json.dumps({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})),
    ("grammar", 'root ::= "yes" | "no"'),
    ("lark", 'start: "yes" | "no"'),
]
NOT_HELD = [
    ("regex", "(?=a)b", "Lookahead"),
    ("json", json.dumps({"type": "string", "pattern": "^(?=.*a)[a-z]+$"}), "Lookahead"),
    ("json", json.dumps({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}), "oneOf"),
    ("grammar", "root ::= (", "cannot be compiled"),
]
DEAR_STEPS = [("regex", "((a{0,100}){0,100}){0,100}"), ("grammar", 'root ::= s\ns ::= s s | s s s | "a" | ""')]


def alternatives(depth: int) -> dict:
    if not depth:
        return {"type": "object", "properties": {"abc": {"type": "string"}}}
    return {"oneOf": [alternatives(depth - 1) for _ in range(3)]}


ENDLESS = ("json", json.dumps(alternatives(8)))


@pytest.fixture(scope="module")
def verdicts():
    """What one process said of all of them, asked together; how often the event loop went round; what the next process says."""

    async def main():
        client = GrammarClient(tokenizer_info, cpu_s=0.5)
        try:
            await client.try_out("grammar", 'root ::= "a"')
            jobs = [*CHEAP, *(job[:2] for job in NOT_HELD), *DEAR_STEPS, ENDLESS]
            asked = asyncio.gather(*(client.try_out(*job) for job in jobs))
            turns = 0
            while not asked.done():
                await asyncio.sleep(0.01)
                turns += 1
            answers = dict(zip(jobs, await asked, strict=True))
            client._process.kill()
            client._process.wait()
            return answers, turns, await client.try_out(*CHEAP[2])
        finally:
            client.close()

    return asyncio.run(main())


def test_what_is_cheap_and_held_is_taken(verdicts):
    assert {job: verdicts[0][job] for job in CHEAP} == dict.fromkeys(CHEAP)


def test_what_is_not_held_is_refused_with_what_it_is(verdicts):
    for kind, spec, why in NOT_HELD:
        assert why in verdicts[0][kind, spec]


def test_what_compiles_at_once_and_takes_its_time_with_every_token_is_refused(verdicts):
    for job in DEAR_STEPS:
        assert verdicts[0][job] == TOO_MUCH_CPU or "a token of it takes" in verdicts[0][job]


def test_what_does_not_compile_in_its_cpu_time_is_ended_and_the_others_are_answered(verdicts):
    assert verdicts[0][ENDLESS] == TOO_MUCH_CPU


def test_the_event_loop_goes_round_meanwhile(verdicts):
    assert verdicts[1] > 10


def test_a_process_that_died_is_replaced(verdicts):
    assert verdicts[2] is None
