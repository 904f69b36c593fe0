"""Texts are worked on off the event loop, in two lanes, never beyond what a model can hold."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from prefillshare.kvshare.caller import Caller, current_caller
from prefillshare.kvshare.errors import DeadlineExceeded, InvalidInput
from prefillshare.kvshare_vllm.surface.renderer_work import RendererWork
from prefillshare.kvshare_vllm.surface.text_work import INLINE_CHARS, SHORT_CHARS, TextWork, chars_of

LONG, SHORT = SHORT_CHARS + 1, SHORT_CHARS


@pytest.fixture
def text():
    text = TextWork(max_tokens=10, chars_per_token=10, timeout_s=30)
    yield text
    text.close()


def test_all_but_the_shortest_work_is_done_off_the_event_loop(text):
    async def main():
        return [await text.run(chars, threading.get_ident) for chars in (INLINE_CHARS, INLINE_CHARS + 1, SHORT, LONG)]

    trivial, short, short_again, long = asyncio.run(main())
    assert trivial == threading.get_ident()
    assert short == short_again
    assert len({trivial, short, long}) == 3


def test_a_short_text_does_not_wait_for_a_long_one(text):
    async def main():
        go_on = threading.Event()
        long = asyncio.create_task(text.run(LONG, lambda: go_on.wait(30)))
        assert await text.run(SHORT, lambda: "short") == "short"
        assert not long.done()
        go_on.set()
        assert await long

    asyncio.run(main())


def test_tenants_take_turns_with_long_texts(text):
    async def main():
        go_on, order = threading.Event(), []

        async def ask(tenant, work):
            current_caller.set(Caller(tenant))
            await text.run(LONG, work)

        tasks = [asyncio.create_task(ask("a", lambda: go_on.wait(30)))]
        for name in ("a1", "a2", "b1"):
            tasks.append(asyncio.create_task(ask(name[0], lambda name=name: order.append(name))))
            await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*tasks)
        assert order == ["a1", "b1", "a2"]

    asyncio.run(main())


def test_work_that_takes_too_long_fails_for_its_client_and_keeps_its_place():
    async def main():
        text, go_on, started = TextWork(10, 10, timeout_s=0.05), threading.Event(), threading.Event()
        try:
            with pytest.raises(DeadlineExceeded, match=r"was not worked on within 0\.05 s"):
                await text.run(LONG, lambda: go_on.wait(30))
            with pytest.raises(DeadlineExceeded):
                await text.run(LONG, started.set)
            assert not started.is_set()
            go_on.set()
            text._timeout_s = 30
            assert await text.run(LONG, lambda: "next") == "next"
        finally:
            go_on.set()
            text.close()

    asyncio.run(main())


def test_what_work_raises_reaches_who_asked(text):
    def fails():
        raise ValueError("no template")

    with pytest.raises(ValueError, match="no template"):
        asyncio.run(text.run(SHORT, fails))


def test_characters_are_those_of_all_messages_together():
    messages = [{"role": "user", "content": "a" * 90}] * 150
    assert chars_of(messages) == 150 * (90 + len("user") + 16)
    assert chars_of([{"role": "user", "content": [{"type": "text", "text": "abc"}]}]) == 4 + 16 + 16 + 4 + 3
    assert chars_of("abc") == 3
    assert chars_of(None) == 0


class TooMuch(Exception):
    pass


def test_a_text_that_cannot_fit_reaches_no_tokeniser_and_no_template(text):
    def reached(*args, **kwargs):
        raise AssertionError("reached")

    renderer = SimpleNamespace(_tokenize_prompt=reached, _decode=reached, _apply_chat_template_async=reached)
    RendererWork(text, renderer, lambda error: TooMuch(str(error))).take_over()
    with pytest.raises(TooMuch, match="101 characters are more than 10 tokens can hold"):
        asyncio.run(renderer._tokenize_prompt_async({"prompt": "a" * 101}, None))
    with pytest.raises(TooMuch, match="messages: "):
        asyncio.run(renderer._apply_chat_template_async(None, None, [{"content": "a" * 60}] * 2))
    with pytest.raises(InvalidInput):
        text.check_chars(101, "prompt")


def test_a_renderer_has_its_work_done_here(text):
    where = []
    renderer = SimpleNamespace(
        _tokenize_prompt=lambda prompt, params: where.append(threading.get_ident()) or prompt,
        _decode=lambda ids: where.append(threading.get_ident()) or "text",
    )
    text.max_chars = 10**6
    RendererWork(text, renderer, lambda error: error).take_over()
    asyncio.run(renderer._tokenize_prompt_async({"prompt": "a" * LONG}, None))
    asyncio.run(renderer._async_tokenizer_decode([1] * LONG))
    assert threading.get_ident() not in where
    assert len(where) == 2
