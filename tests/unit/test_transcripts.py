"""Transcripts become what a session would hold: the same layout, responses where they were, nothing lost unseen."""

import json
from types import SimpleNamespace

import pytest
from char_tokenizer import Tokenizer, text

from finetuning import transcripts
from kvshare.errors import ConfigError

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "so it is"},
]


STOPS = (ord("$"), ord(">"))


@pytest.fixture
def read(tmp_path):
    def read(*records, max_tokens=1000, stops=STOPS):
        file = tmp_path / "data.jsonl"
        file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
        examples, read.left_out = transcripts.read(file, Tokenizer(), stops, max_tokens)
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


@pytest.mark.parametrize(
    "line",
    ["{", '{"messages": [{"role": "user", "content": "x"}]}', '{"prompt": "", "response": "x"}', '{"prompt": "x"}',
     '{"messages": [{"role": "assistant", "content": "x"}]}', "[]", '{"messages": [{"role": "user"}]}',
     json.dumps({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}),
     json.dumps({"messages": [CHAT[0], CHAT[1] | {"weight": 2}]})],
)  # fmt: skip
def test_a_line_that_cannot_be_used_is_named(read, line):
    with pytest.raises(ConfigError, match="line 2"):
        read({"prompt": "a", "response": "b"}, line)


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
