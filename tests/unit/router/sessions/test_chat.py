"""Messages appended to a context: what the template would have written there, without touching what is there."""

import pytest
from char_tokenizer import Tokenizer, text

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.router.sessions.chat import ChatLayout


@pytest.fixture
def layout():
    return ChatLayout(Tokenizer())


HELLO = [{"role": "user", "content": "hello"}]
WHOLE = "<system:be kind>\n<user:hello>\n<assistant:hi>\n<user:hello>\n<assistant:"


def test_an_opening_is_the_template_itself(layout):
    assert text(layout.opening(HELLO)) == "<system:be kind>\n<user:hello>\n<assistant:"


def test_appending_after_a_cut_response_closes_it_first(layout):
    context = layout.opening(HELLO) + layout.ids("hi")
    assert text(context + layout.appended(context, True, HELLO)) == WHOLE


def test_appending_after_a_response_that_ended_itself_does_not_close_it_twice(layout):
    context = layout.opening(HELLO) + layout.ids("hi>")
    assert text(context + layout.appended(context, True, HELLO)) == WHOLE


def test_appending_to_a_context_without_an_open_response_closes_nothing(layout):
    assert text(layout.appended(layout.ids("notes"), False, HELLO)) == "<user:hello>\n<assistant:"


def test_the_default_system_message_comes_only_at_the_beginning(layout):
    assert "be kind" not in text(layout.appended(layout.ids("x"), False, [{"role": "tool", "content": "42"}]))


def test_a_template_that_rewrites_the_past_is_refused(layout):
    class Rewriting(Tokenizer):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return f"{len(messages)} messages: " + super().apply_chat_template(messages, tokenize, add_generation_prompt)

    with pytest.raises(InvalidInput, match="rewrites earlier messages"):
        ChatLayout(Rewriting()).appended([1], False, HELLO)


def test_a_model_without_a_template_is_told_to_use_text(layout):
    class Bare(Tokenizer):
        def apply_chat_template(self, *args, **kwargs):
            raise ValueError("no template")

    with pytest.raises(InvalidInput, match=r"no chat template.*append text"):
        ChatLayout(Bare()).opening(HELLO)
