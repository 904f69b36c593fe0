"""Where a turn's tools, suffix and answer stand behind the context, what of it is kept, and which calls wait for a result."""

from types import SimpleNamespace

import pytest
from char_tokenizer import Chats, ToolTokenizer, text

from prefillshare.kvshare.config import Base
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.text_work import TextWork
from prefillshare.router.sessions.base import Session
from prefillshare.router.sessions.transcript import Transcript
from prefillshare.router.sessions.turn_inputs import TurnInputs
from prefillshare.router.sessions.unanswered import MOST_CALLS, left_unanswered

LENGTH = 4096
ASK = {"role": "user", "content": "hi"}
PLAN = {"role": "system", "content": "plan"}
TOOLS = [{"type": "function", "function": {"name": "look"}}]
OTHER = [{"type": "function", "function": {"name": "jump"}}]
SHOWN, KIND = '<tool:{"name": "look"}>\n', "<system:be kind>\n"
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "map"}}}


def messages(*given):
    return ("messages", list(given))


@pytest.fixture
def frontend():
    tokenizer = ToolTokenizer()
    made = SimpleNamespace(
        renderer=SimpleNamespace(tokenizer=tokenizer),
        chats=Chats(tokenizer),
        text=TextWork(LENGTH, 1),
        model_config=SimpleNamespace(get_vocab_size=lambda: 256),
    )
    yield made
    made.text.close()


@pytest.fixture
def inputs(frontend):
    return TurnInputs(Base(model="m", max_model_len=LENGTH), frontend)


@pytest.fixture
def first(frontend):
    return TurnInputs(Base(model="m", max_model_len=LENGTH), frontend, own_first=True)


def session(says: str = "", *said, is_open: bool = False, **more) -> Session:
    transcript = Transcript().with_messages(said) if said or not says else None
    return Session("s", token_ids=tuple(map(ord, says)), open_response=is_open, transcript=transcript, **more)


async def laid_out(inputs, session, given=None, suffix=None, tools=None) -> tuple[str, str]:
    """(what is kept, what the decoder sees besides, where the kept part has the answer's opening)"""
    begun = await inputs.lay_out(session, given, suffix, tools)
    return text(begun.laid_out.context), text(begun.laid_out.seen)


BEFORE = KIND + "<user:hi>\n"


@pytest.mark.parametrize(
    ("suffix", "seen"),
    [
        (None, SHOWN + KIND + "<assistant:"),
        (messages(PLAN), SHOWN + "<system:plan>\n<assistant:"),
        (messages(PLAN, ASK), SHOWN + "<system:plan>\n<user:hi>\n<assistant:"),
        (messages(ASK), SHOWN + KIND + "<user:hi>\n<assistant:"),
        (("text", "Well, "), SHOWN + KIND + "<assistant:Well, "),
        (("token_ids", [65]), SHOWN + KIND + "<assistant:A"),
    ],
)
async def test_tools_stand_between_what_is_kept_and_the_answer_and_a_suffix_with_them(inputs, suffix, seen):
    assert await laid_out(inputs, session(), messages(ASK), suffix, TOOLS) == (BEFORE + "<assistant:", BEFORE + seen)


async def test_behind_a_context_an_open_answer_is_closed_once(inputs):
    kept, seen = await laid_out(inputs, session(BEFORE + "<assistant:yes", ASK, ASK, is_open=True), messages(ASK), None, TOOLS)
    closed = BEFORE + "<assistant:yes>\n<user:hi>\n"
    assert (kept, seen) == (closed + "<assistant:", closed + SHOWN + KIND + "<assistant:")


@pytest.mark.parametrize("suffix", [None, messages(PLAN)])
@pytest.mark.parametrize("tools", [None, TOOLS])
async def test_without_an_input_the_answer_is_opened_all_the_same(inputs, suffix, tools):
    if not (suffix or tools):
        assert await laid_out(inputs, session(BEFORE, ASK)) == (BEFORE, BEFORE)
        return
    own = (SHOWN if tools else "") + ("<system:plan>\n" if suffix else KIND)
    begun = await inputs.lay_out(session(BEFORE, ASK), None, suffix, tools)
    assert text(begun.laid_out.context) == BEFORE + "<assistant:"
    assert text(begun.laid_out.seen) == BEFORE + own + "<assistant:"
    assert (begun.opened, begun.transcript) == (True, Transcript().with_messages([ASK]))
    closed = BEFORE + "<assistant:yes>\n"
    kept, seen = await laid_out(inputs, session(BEFORE + "<assistant:yes", ASK, ASK, is_open=True), None, suffix, tools)
    assert (kept, seen) == (closed + "<assistant:", closed + own + "<assistant:")


async def test_an_agents_own_part_stays_in_its_place_while_nothing_else_comes_between(inputs):
    own = SHOWN + "<system:plan>\n"
    first = await inputs.lay_out(session(), messages(ASK), messages(PLAN), TOOLS)
    assert (text(first.laid_out.seen), first.own.tokens) == (BEFORE + own + "<assistant:", len(BEFORE))
    after = session(BEFORE + "<assistant:yes", ASK, ASK, is_open=True, own=first.own)
    again = await inputs.lay_out(after, messages(ASK), messages(PLAN), TOOLS)
    later = "<assistant:yes>\n<user:hi>\n<assistant:"
    assert (text(again.laid_out.context), text(again.laid_out.seen)) == (BEFORE + later, BEFORE + own + later)
    assert (again.own, again.laid_out.goes_on) == (first.own, True)
    for suffix, tools in ((messages(ASK), TOOLS), (messages(PLAN, ASK), TOOLS), (messages(PLAN), OTHER), (None, None)):
        other = await inputs.lay_out(after, messages(ASK), suffix, tools)
        assert not other.laid_out.goes_on
        assert other.own != first.own
    ask, well, more = messages(ASK), ("text", "Well, "), ("text", " more")
    for given, suffix in ((ask, well), (ask, ask), (more, messages(PLAN))):
        assert (await inputs.lay_out(after, given, suffix, TOOLS)).own is None, "what is not kept stands behind it"


async def test_a_context_of_text_goes_on_as_text_behind_tools(inputs):
    kept, seen = await laid_out(inputs, session("notes"), ("text", " more"), None, TOOLS)
    assert (kept, seen) == ("notes more", "notes more" + SHOWN + KIND + "<assistant:")
    assert (await inputs.lay_out(session("notes"), ("text", " more"), None, TOOLS)).transcript is None


async def test_an_empty_session_without_input_may_begin_with_what_is_not_kept(inputs):
    kept, seen = await laid_out(inputs, session(), None, messages(PLAN, ASK), TOOLS)
    assert (kept, seen) == ("", SHOWN + "<system:plan>\n<user:hi>\n<assistant:")
    assert await laid_out(inputs, session(), None, None, TOOLS) == ("", ""), "there is nothing to answer to"


async def test_what_is_wrong_with_a_suffix_is_said_of_it(inputs):
    with pytest.raises(InvalidInput) as raised:
        await laid_out(inputs, session(), messages(ASK), messages(PLAN, {"role": "robot", "content": ""}), TOOLS)
    assert raised.value.field == "suffix.messages.1.role"


async def test_own_prompts_first_tools_begin_the_session_and_are_kept(first):
    begun = await first.lay_out(session(), messages(ASK), None, TOOLS)
    assert text(begun.laid_out.context) == text(begun.laid_out.seen) == SHOWN + BEFORE + "<assistant:"
    later = Session("s", token_ids=tuple(begun.laid_out.context), open_response=True, transcript=begun.transcript)
    kept, seen = await laid_out(first, later, messages(ASK), None, TOOLS)
    assert kept == seen == SHOWN + BEFORE + "<assistant:>\n<user:hi>\n<assistant:"
    for wrong in (session(BEFORE, ASK), session("notes"), later):
        with pytest.raises(InvalidInput, match="has not begun with these tools") as raised:
            await laid_out(first, wrong, messages(ASK), None, OTHER)
        assert raised.value.field == "tools"
    with pytest.raises(InvalidInput, match="before the first messages"):
        await laid_out(first, session(), ("text", "notes"), None, TOOLS)


async def test_a_context_says_what_was_given_and_nothing_of_a_decoders_own_part(inputs):
    begun = await inputs.lay_out(session(), messages(ASK), messages(PLAN), TOOLS)
    assert begun.transcript == Transcript().with_messages([ASK])


async def test_calls_and_their_results_are_laid_out_as_messages(inputs):
    answer = {"role": "assistant", "content": "Hm.", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "Paris", "tool_call_id": "1"}
    begun = await inputs.beginning(messages(ASK, answer, result))
    assert text(begun.token_ids) == BEFORE + '<assistant:Hm.[look {"at": "map"}]>\n<tool:Paris>\n'
    assert (begun.unanswered, begun.transcript) == ((), Transcript().with_messages([ASK, answer, result]))
    assert (await inputs.beginning(messages(ASK, answer))).unanswered == ("1",)
    with pytest.raises(InvalidInput) as raised:
        await inputs.beginning(messages(ASK, result))
    assert raised.value.field == "input.messages.1.tool_call_id"
    assert (await inputs.beginning(("text", "notes"))).unanswered is None, "what a text says is not known"
    assert (await inputs.beginning(None)).unanswered == ()


async def test_a_result_answers_a_call_that_waits_once(inputs):
    def answering(*ids):
        return messages(*({"role": "tool", "content": "x", "tool_call_id": one} for one in ids))

    begun = await inputs.lay_out(session(BEFORE, ASK, unanswered=("1", "2")), answering("2"), None, None)
    assert begun.unanswered == ("1",)
    for given, field in ((answering("3"), 0), (answering("1", "1"), 1)):
        with pytest.raises(InvalidInput) as raised:
            await inputs.lay_out(session(BEFORE, ASK, unanswered=("1", "2")), given, None, None)
        assert raised.value.field == f"input.messages.{field}.tool_call_id"
    unknown = await inputs.lay_out(session(BEFORE, ASK), answering("3", "3"), None, None)
    assert unknown.unanswered is None
    assert left_unanswered([], [{"tool_calls": [CALL] * (MOST_CALLS + 1)}]) is None


async def test_where_a_context_ends_inside_a_message_and_where_not(inputs):
    whole = BEFORE + "<assistant:yes>\n<user:hi>\n<assistant:no"
    chat = session(whole, ASK, ASK, is_open=True)
    closed = [tokens for tokens in range(len(whole) + 1) if inputs.is_closed(chat, tokens)]
    ends = [place + 2 for place in range(len(whole)) if whole.startswith(">\n", place)]
    assert closed == [0, *ends]
    assert all(inputs.is_closed(session("notes"), tokens) for tokens in range(6))
