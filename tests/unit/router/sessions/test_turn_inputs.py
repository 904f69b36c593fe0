"""What a session is given is bounded as a whole before any of it is tokenised, and tokenised off the event loop."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from char_tokenizer import Chats, Tokenizer, text

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.text_work import SHORT_CHARS, TextWork
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.sessions.turns import Turns

LENGTH = 2 * SHORT_CHARS


class Watched(Tokenizer):
    """Where it was called."""

    def __init__(self):
        self.threads = []

    def encode(self, *args, **kwargs):
        self.threads.append(threading.get_ident())
        return super().encode(*args, **kwargs)

    def apply_chat_template(self, *args, **kwargs):
        self.threads.append(threading.get_ident())
        return super().apply_chat_template(*args, **kwargs)


class Sessions:
    async def create(self, session_id, ids, **given):
        return ids


@pytest.fixture
def tokenizer():
    return Watched()


@pytest.fixture
def turns(tokenizer):
    frontend = SimpleNamespace(
        renderer=SimpleNamespace(tokenizer=tokenizer),
        chats=Chats(tokenizer),
        text=TextWork(LENGTH, 1),
        model_config=SimpleNamespace(get_vocab_size=lambda: 256),
    )
    yield Turns(Base(model="m", max_model_len=LENGTH), {}, frontend, Sessions(), ResponseKV())
    frontend.text.close()


def refused(turns, given) -> str:
    with pytest.raises(InvalidInput) as caught:
        asyncio.run(turns.create("s", given))
    return caught.value.field


def test_messages_are_bounded_together_and_none_is_tokenised(turns, tokenizer):
    each = "a" * (LENGTH // 100)
    assert refused(turns, ("messages", [{"role": "user", "content": each}] * 150)) == "input.messages"
    assert refused(turns, ("messages", [{"role": "user", "content": ""}] * LENGTH)) == "input.messages"
    assert refused(turns, ("text", "a" * (LENGTH + 1))) == "input.text"
    assert tokenizer.threads == []


def test_more_token_ids_than_the_model_holds_are_not_looked_at_one_by_one(turns):
    class Ids(list):
        def __iter__(self):
            raise AssertionError("looked at")

    assert refused(turns, ("token_ids", Ids([1] * (LENGTH + 1)))) == "input.token_ids"


def test_long_texts_and_messages_are_tokenised_off_the_event_loop(turns, tokenizer):
    long = "a" * (SHORT_CHARS + 1)
    assert text(asyncio.run(turns.create("s", ("text", long)))) == long
    assert long in text(asyncio.run(turns.create("s", ("messages", [{"role": "user", "content": long}]))))
    assert len(tokenizer.threads) == 3
    assert threading.get_ident() not in tokenizer.threads


def test_a_short_message_is_laid_out_as_ever(turns):
    ids = asyncio.run(turns.create("s", ("messages", [{"role": "user", "content": "hello"}])))
    assert text(ids) == "<system:be kind>\n<user:hello>\n"
