"""Transcripts become what a session would hold: the same layout, responses where they were, nothing lost unseen."""

import json
from types import SimpleNamespace

import pytest
from char_tokenizer import Tokenizer, ToolTokenizer, text

from prefillshare.finetuning import transcripts
from prefillshare.kvshare.errors import ConfigError

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "so it is"},
]


STOPS = (ord("$"), ord(">"))


@pytest.fixture
def read(tmp_path):
    def read(*records, max_tokens=1000, stops=STOPS, tokenizer=None):
        file = tmp_path / "data.jsonl"
        file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
        examples, read.left_out = transcripts.read(file, tokenizer or Tokenizer(), stops, max_tokens)
        return examples

    return read


def spans(example):
    return [text(example.token_ids[start:end]) for start, end in example.responses]


def test_a_transcript_is_laid_out_as_a_session_grows(read):
    (example,) = read({"messages": CHAT})
    assert text(example.token_ids) == (
        "<system:be kind>\n<user:hello>\n<assistant:hi>\n<tool:42>\n<assistant:so it is>"
    )
    assert spans(example) == ["hi>", "so it is>"]


def test_what_another_decoder_said_is_context(read):
    others = [message | ({"weight": 0} if message["content"] == "hi" else {}) for message in CHAT]
    (mine,), (all_learnt,) = read({"messages": others}), read({"messages": CHAT})
    assert spans(mine) == ["so it is>"]
    assert mine.token_ids == all_learnt.token_ids
    (first,) = read({"messages": [*CHAT[:3], CHAT[3] | {"weight": 0}]})
    assert text(first.token_ids).endswith("<assistant:hi>")


def test_text_ends_with_the_end_of_text(read):
    (example,) = read({"prompt": "2+2=", "response": "4"})
    assert text(example.token_ids) == "2+2=4$"
    assert spans(example) == ["4$"]


def test_responses_that_do_not_fit_are_left_out_and_counted(read):
    (example,) = read({"messages": CHAT}, {"prompt": "long " * 20, "response": "x"}, max_tokens=60)
    assert read.left_out == 2
    assert spans(example) == ["hi>"]
    assert text(example.token_ids).endswith("<assistant:hi>")


def test_data_without_a_response_that_fits_is_refused(read):
    with pytest.raises(ConfigError, match="no response within 10 tokens"):
        read({"messages": CHAT}, max_tokens=10)


def chat(**answer):
    return {"messages": [CHAT[0], {"role": "assistant"} | answer]}


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ('{"prompt": "x", "prompt": "y", "response": "z"}', "key 'prompt' is given twice"),
        ("[]", "should be an object"),
        ("{}", "messages: required, but not given"),
        ({"messages": []}, "messages: should have at least one entry"),
        ({"messages": [CHAT[0]]}, "no assistant message to be learnt"),
        ({"messages": [CHAT[1]]}, "an assistant message follows no other"),
        ({"messages": [*CHAT[:2], CHAT[1]]}, "an assistant message follows no other"),
        ({"messages": [{"role": "user"}, CHAT[1]]}, "messages.0: content should be text, got nothing"),
        ({"messages": [{"role": "person", "content": "x"}, CHAT[1]]}, "messages.0.role: Input should be 'system', 'user'"),
        ({"messages": [CHAT[0] | {"weight": 0}, CHAT[1]]}, "`weight` goes with the role assistant, not with user"),
        ({"messages": [CHAT[0] | {"tool_calls": [CALL]}, CHAT[1]]}, "`tool_calls` goes with the role assistant"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}, "no assistant message to be learnt"),
        (chat(content="x", weight=2), "messages.1.weight: Input should be 0 or 1, got 2"),
        (chat(content="x", wieght=0), "messages.1.wieght: unknown key; did you mean 'weight'?"),
        (chat(content="x", function_call={}), "messages.1.function_call: unknown key"),
        (chat(content=None), "messages.1: content should be text, got nothing"),
        (chat(content=["x"]), "messages.1.content: Input should be a valid string, got a list"),
        (chat(content=""), "messages.1: an answer without content: nothing but its end would be learnt"),
        (chat(content="", tool_calls=[]), "messages.1: an answer without content"),
        (chat(content=None, tool_calls=[CALL]), "the base's chat template leaves `tool_calls` out"),
        (chat(content="", tool_calls=[{"function": {"name": "add", "arguments": "{"}}]), "arguments: '{' is not JSON"),
        (chat(content="", tool_calls=[{"function": {"name": "add", "args": {}}}]), "unknown key; did you mean 'arguments'?"),
        ({"messages": CHAT, "tools": [TOOL]}, "the base's chat template leaves `tools` out"),
        ({"messages": CHAT, "tool": [TOOL]}, "tool: unknown key; did you mean 'tools'?"),
        ({"messages": CHAT, "tools": [{"name": "add"}]}, "tools.0.function: required, but not given"),
        ({"messages": CHAT, "prompt": "x", "response": "y"}, "messages: unknown key; known keys: prompt, response"),
        ({"prompt": "", "response": "x"}, "prompt: should not be empty"),
        ({"prompt": "x", "response": ""}, "response: should not be empty"),
        ({"prompt": "x"}, "response: required, but not given"),
        ({"prompt": "x", "completion": "y"}, "response: required, but not given"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_with_its_number_and_key(read, line, said):
    with pytest.raises(ConfigError, match=r"data\.jsonl, line 2: ") as refused:
        read({"prompt": "a", "response": "b"}, line)
    assert said in str(refused.value)


def test_tools_and_calls_are_laid_out_by_the_template_and_calls_are_learnt(read):
    asked, said = CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answered = {"role": "tool", "content": "42", "tool_call_id": "1"}
    (example,) = read({"tools": [TOOL], "messages": [asked, said, answered, CHAT[3]]}, tokenizer=ToolTokenizer())
    assert spans(example) == ['[add {"a": 1}]>', "so it is>"]
    assert text(example.token_ids) == (
        '<tool:{"name": "add", "description": null, "parameters": {"type": "object"}}>\n'
        '<system:be kind>\n<user:hello>\n<assistant:[add {"a": 1}]>\n<tool:42>\n<assistant:so it is>'
    )


def test_an_answer_may_hold_text_and_calls_and_be_context(read):
    both = {"role": "assistant", "content": "wait ", "tool_calls": [CALL, CALL]}
    (example,) = read({"messages": [CHAT[0], both | {"weight": 0}, *CHAT[2:]]}, tokenizer=ToolTokenizer())
    assert spans(example) == ["so it is>"]
    assert '<assistant:wait [add {"a": 1}][add {"a": 1}]>' in text(example.token_ids)


def test_calls_that_the_template_lays_out_in_part_only_are_refused(read):
    class First(ToolTokenizer):
        def apply_chat_template(self, messages, *args, **kwargs):
            first = [m | ({"tool_calls": m["tool_calls"][:1]} if "tool_calls" in m else {}) for m in messages]
            return super().apply_chat_template(first, *args, **kwargs)

    other = CALL | {"function": {"name": "subtract", "arguments": {}}}
    with pytest.raises(ConfigError, match="line 1: tool_calls: the base's chat template leaves `tool_calls` out"):
        read(chat(content="", tool_calls=[CALL, other]), tokenizer=First())


def test_calls_behind_another_opening_than_text_are_refused(read):
    class Otherwise(ToolTokenizer):
        def apply_chat_template(self, messages, *args, **kwargs):
            text = super().apply_chat_template(messages, *args, **kwargs)
            return text.replace("<assistant:[", "<caller:[")

    with pytest.raises(ConfigError, match="line 1: tool_calls: the base's chat template opens or closes"):
        read(chat(content="", tool_calls=[CALL]), tokenizer=Otherwise())


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    for name in ("none.jsonl", "bytes.jsonl"):
        with pytest.raises(ConfigError, match=f"cannot read .*{name}") as refused:
            transcripts.read(tmp_path / name, Tokenizer(), STOPS, 100, field="validation")
        assert refused.value.field == "validation"


@pytest.mark.parametrize("record", [{"messages": CHAT}, {"prompt": "2+2=", "response": "4"}])
def test_an_answer_that_would_not_stop_is_refused(read, record):
    with pytest.raises(ConfigError, match="line 1"):
        read(record, stops=())


def test_the_stop_tokens_are_the_tokenizers_and_the_generation_configs(tmp_path):
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert transcripts.stop_ids(tmp_path, tokenizer) == (7,)
    for given, want in ((9, (7, 9)), ([7, 8], (7, 8)), (None, (7,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        assert transcripts.stop_ids(tmp_path, tokenizer) == want
