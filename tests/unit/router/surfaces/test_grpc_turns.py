"""gRPC turns with tools, formats and several responses, and sessions that are listed and changed. No engine runs: turns answer
what a test tells them."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
import pytest_asyncio
from grpc_surface import GrpcSurface

from prefillshare.client import AsyncClient
from prefillshare.kvshare.errors import AlreadyExists, Conflict, InvalidInput, NotFound, SessionBusy
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ASK = {"role": "user", "content": "Capital of France?"}
PLAN = {"role": "system", "content": "You plan."}
SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
JUMP = {"type": "function", "function": {"name": "jump", "parameters": SCHEMA}}
OPENING = "<|im_start|>assistant\n"
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def called(*names: str) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {{"at": "map"}}}}\n</tool_call>' for name in names)


def shown(*messages) -> str:
    return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def surface(smollm):
    surface = GrpcSurface(str(smollm))
    await surface.start()
    surface.client = AsyncClient(surface.grpc_address, retries=None)
    yield surface
    await surface.client.close()
    await surface.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def session(surface):
    surface.answers, surface.prompts, surface.samplings, surface.ending = ["Paris."], [], [], "stop"
    made = await surface.client.create_session()
    yield made
    await made.delete()


async def said(surface, session) -> str:
    return surface.tokenizer.decode((await session.get(with_token_ids=True)).token_ids)


CHOICES = {"auto": "auto", "required": "required", "named": TOOL | {"function": {"name": "look"}}, "none": "none"}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("answer", [called("look"), "Let me look. " + called("look"), called("look", "jump"), "No."])
async def test_calls_are_found_as_over_http(surface, session, choice, answer):
    """What a client of either surface gets is the same; so is what it asks of the engine."""
    given = {"tools": [TOOL, JUMP], "tool_choice": CHOICES[choice]}
    surface.answers = [answer]
    turn = await session.turn("planner", messages=[ASK], max_tokens=50, **given)
    body = {"model": "planner", "messages": [ASK], "max_tokens": 50, "temperature": 0, "stream": True, **given}
    content, calls, reason = "", {}, ""
    async with surface.http.stream("POST", "/v1/chat/completions", json=body) as answered:
        async for line in answered.aiter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line.removeprefix("data: "))["choices"][0]
            content, reason = content + (part["delta"].get("content") or ""), part["finish_reason"] or reason
            for piece in part["delta"].get("tool_calls") or ():
                call = calls.setdefault(piece["index"], {"name": "", "arguments": ""})
                for name, value in piece["function"].items():
                    call[name] += value or ""
    assert turn.text == content
    assert [(call.name, call.arguments) for call in turn.tool_calls] == [tuple(call.values()) for call in calls.values()]
    assert all(call.id for call in turn.tool_calls)
    if choice != "named":  # OpenAI says "stop" there
        assert turn.finish_reason == reason
    ours, theirs = surface.samplings[-2:]
    assert (ours.skip_special_tokens, ours.structured_outputs) == (theirs.skip_special_tokens, theirs.structured_outputs)


async def test_a_forced_call_is_held_to_a_format_and_a_free_one_is_not(surface, session):
    surface.answers = [called("look")]
    for choice, is_held in (("auto", False), ("required", True), ("look", True), ("none", False)):
        await session.turn("planner", messages=[ASK], tools=[TOOL], tool_choice=choice)
        assert (surface.samplings[-1].structured_outputs is not None) == is_held, choice


async def test_pieces_of_a_call_come_as_they_are_made(surface, session):
    surface.answers = ["Hm. " + called("look", "jump")]
    surface.pace, pieces = asyncio.Semaphore(1), []
    try:
        async for piece in session.stream("planner", messages=[ASK], tools=[TOOL, JUMP]):
            pieces.append(piece)
            surface.pace.release()  # the next token is made when its client has the last one
    finally:
        surface.pace = None
    told = [piece for piece in pieces if piece.tool_calls]
    assert len(told) > 2
    begun = [(piece.index, piece.name) for one in told for piece in one.tool_calls if piece.name]
    assert begun == [(0, "look"), (1, "jump")]
    joined = ["".join(p.arguments for one in told for p in one.tool_calls if p.index == number) for number in (0, 1)]
    assert [json.loads(arguments) for arguments in joined] == [{"at": "map"}] * 2
    done = pieces[-1].done
    assert [(call.name, call.arguments) for call in done.tool_calls] == list(zip(("look", "jump"), joined, strict=True))
    assert (done.finish_reason, done.turns) == ("tool_calls", 1)
    assert sum(len(piece.token_ids) for piece in pieces) > 20, "every token comes, also those of calls"


async def test_one_call_at_most_where_that_is_asked_for(surface, session):
    surface.answers = [called("look", "jump")]
    turn = await session.turn("planner", messages=[ASK], tools=[TOOL, JUMP], parallel_tool_calls=False)
    assert [call.name for call in turn.tool_calls] == ["look"]


async def test_a_call_that_is_cut_off_says_length_and_keeps_what_was_made(surface, session):
    surface.answers, surface.ending = [called("look").removesuffix('map"}}\n</tool_call>') + "m"], "length"
    turn = await session.turn("planner", messages=[ASK], tools=[TOOL])
    assert turn.finish_reason == "length"
    assert (await said(surface, session)).endswith(surface.answers[0])


async def test_results_go_back_and_the_session_holds_the_calls_as_they_were_generated(surface, session):
    spaced = called("look").replace('": ', '":  ')
    surface.answers = [spaced, "It is Paris."]
    call = (await session.turn("planner", messages=[ASK], tools=[TOOL])).tool_calls[0]
    assert json.loads(call.arguments) == {"at": "map"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "Paris"}
    turn = await session.turn("coder", messages=[result], tools=[TOOL])
    assert (turn.text, turn.tool_calls) == ("It is Paris.", [])
    assert spaced in surface.prompts[-1]
    assert surface.prompts[-1].endswith(shown(result) + OPENING)
    with pytest.raises(InvalidInput, match=r"input\.messages\.0\.tool_call_id: no call"):
        await session.turn("coder", messages=[result], tools=[TOOL])


@pytest.mark.parametrize("choice", ["required", "named"])
@pytest.mark.parametrize(
    ("format", "field"),
    [({"regex": "a+"}, "regex"), ({"choice": ["a", "b"]}, "choice"), ({"json_schema": SCHEMA}, "json_schema")],
)
async def test_a_format_beside_a_forced_call_is_refused(surface, session, choice, format, field):
    with pytest.raises(InvalidInput) as raised:
        await session.turn("planner", messages=[ASK], tools=[TOOL], tool_choice=CHOICES[choice], **format)
    assert (raised.value.field, surface.prompts) == (f"sampling.{field}", [])


@pytest.mark.parametrize("named", [{"tool_call_id": "nobody's"}, {}])
async def test_a_result_without_its_call_is_refused_and_changes_nothing(surface, session, named):
    with pytest.raises(InvalidInput) as raised:
        await session.turn("planner", messages=[ASK, {"role": "tool", "content": "Paris", **named}])
    assert raised.value.field == "input.messages.1.tool_call_id"
    assert (await session.get()).turns == 0


async def test_calls_of_a_history_are_laid_out_as_over_http(surface, session):
    history = [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": {
            "name": "look", "arguments": '{"at": "map"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "Paris"},
    ]  # fmt: skip
    await session.turn("planner", messages=history)
    await surface.http.post("/v1/chat/completions", json={"model": "planner", "messages": history})
    assert surface.prompts[-1] == surface.prompts[-2]


async def test_a_system_message_in_the_suffix_is_the_agents_own(surface, session):
    await session.turn("planner", messages=[ASK], suffix_messages=[PLAN], tools=[TOOL])
    assert surface.prompts[-1] == DEFAULT + shown(ASK, PLAN) + OPENING
    assert await said(surface, session) == DEFAULT + shown(ASK) + OPENING + "Paris.<|im_end|>"


async def test_agents_that_call_tools_see_the_same_over_both_surfaces(smollm):
    """Two agents over one session, with tools and system prompts of their own, over gRPC and over HTTP with the header."""
    surface = GrpcSurface(str(smollm), base={"chat_template": "smollm2_tools"})
    await surface.start()
    code = {"role": "system", "content": "You code."}
    turns = [("planner", PLAN, [TOOL], ASK, called("look")), ("planner", PLAN, [TOOL], "result", "Paris."),
             ("coder", code, [JUMP], {"role": "user", "content": "Jump!"}, called("jump")),
             ("coder", code, [JUMP], "result", "Done."), ("planner", PLAN, [TOOL], ASK, "Paris, as I said.")]  # fmt: skip
    async with AsyncClient(surface.grpc_address) as client:
        session, history, ids, prompts = await client.create_session("over grpc"), [], {"grpc": "", "http": ""}, {}
        for way in ids:
            surface.prompts = []
            for decoder, own, tools, new, answer in turns:
                surface.answers = [answer]
                given = {"role": "tool", "tool_call_id": ids[way], "content": "a map"} if new == "result" else new
                if way == "grpc":
                    turn = await session.turn(decoder, messages=[given], suffix_messages=[own], tools=tools)
                    message, calls = turn.message, [call.id for call in turn.tool_calls]
                else:
                    history.append(given)
                    body = {"model": decoder, "messages": [own, *history], "tools": tools}
                    headers = {"x-prefillshare-session": "over http"}
                    response = await surface.http.post("/v1/chat/completions", json=body, headers=headers)
                    message = response.json()["choices"][0]["message"]
                    calls = [call["id"] for call in message.get("tool_calls") or ()]
                    history.append(message)
                ids[way] = next(iter(calls), "")
            prompts[way] = surface.prompts
    await surface.stop()
    assert prompts["grpc"] == prompts["http"]
    assert [prompt.count("You plan.") + prompt.count("You code.") for prompt in prompts["grpc"]] == [1] * len(turns)
    kept = [(await surface.sessions.get(name, tenant="")) for name in ("over grpc", "over http")]
    assert kept[0].token_ids == kept[1].token_ids
    assert (kept[0].transcript, kept[0].own) == (kept[1].transcript, kept[1].own)


async def test_an_http_client_goes_on_from_a_grpc_session_with_calls(surface, session):
    surface.answers = ["Hm.\n" + called("look"), "Paris."]
    turn = await session.turn("planner", messages=[ASK], tools=[TOOL])
    call = turn.tool_calls[0]
    made = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    answer = {"role": "assistant", "content": turn.text, "tool_calls": [made]}
    messages = [ASK, answer, {"role": "tool", "tool_call_id": call.id, "content": "Paris"}]
    headers = {"x-prefillshare-session": session.session_id}
    response = await surface.http.post("/v1/chat/completions", json={"model": "coder", "messages": messages}, headers=headers)
    assert response.headers["x-prefillshare-session-state"] == "continued"


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ({"json_schema": SCHEMA}, "json", json.dumps(SCHEMA)),
        ({"json_object": True}, "json_object", True),
        ({"regex": "[ab]+"}, "regex", "[ab]+"),
        ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"choice": ["yes", "no"]}, "grammar", 'root ::= "yes" | "no"'),
    ],
)
async def test_formats_reach_the_engine_as_those_of_http_do(surface, session, given, kind, value):
    await session.turn("planner", messages=[ASK], **given)
    format = surface.samplings[-1].structured_outputs
    assert (getattr(format, kind), format._backend) == (value, "xgrammar")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"json_schema": "{"}, "sampling.json_schema"),
        ({"json_schema": {"type": "string", "format": "idn-email"}}, "sampling.json_schema"),
        ({"regex": "("}, "sampling.regex"),
        ({"regex": "a" * 200_000}, "sampling.regex"),
        ({"choice": []}, "sampling.choice"),
        ({"grammar": " "}, "sampling.grammar"),
        ({"grammar": "root := x"}, "sampling.grammar"),
        ({"json_object": False}, "sampling.json_object"),
        ({"regex": "a", "min_tokens": 3}, "sampling.min_tokens"),
        ({"allowed_token_ids": [10**6]}, "sampling.allowed_token_ids"),
        ({"allowed_token_ids": [1] * 60_000}, "sampling.allowed_token_ids"),
        ({"bad_words": ["x" * 20_000]}, "sampling.bad_words"),
        ({"repetition_detection": {"max_pattern_size": 1000, "min_count": 4}}, "sampling.repetition_detection"),
        ({"tools": [TOOL], "tool_choice": "jump"}, "tool_choice.function"),
    ],
)
async def test_what_http_refuses_is_refused_here_with_the_field_that_was_sent(surface, session, given, field):
    with pytest.raises(InvalidInput) as raised:
        await session.turn("planner", messages=[ASK], **given)
    assert raised.value.field == field
    assert (await session.get()).turns == 0


async def test_several_responses_are_told_apart_and_none_is_kept(surface, session):
    await session.turn("planner", messages=[ASK])
    before = await said(surface, session)
    surface.answers = ["One.", "Two, longer.", called("look")]
    async with surface.sessions.turn(session.session_id, tenant=""):  # they need not hold it
        choices = await session.choices("planner", messages=[ASK], n=3, temperature=1, seed=5, tools=[TOOL])
    assert [(one.index, one.text, one.finish_reason) for one in choices] == [
        (0, "One.", "stop"), (1, "Two, longer.", "stop"), (2, "", "tool_calls")
    ]  # fmt: skip
    assert [call.name for call in choices[2].tool_calls] == ["look"]
    assert [(one.turns, one.context_tokens) for one in choices] == [(1, (await session.get()).context_tokens)] * 3
    assert await said(surface, session) == before
    await session.turn("coder", messages=[ASK, choices[1].message, {"role": "user", "content": "On."}])
    assert shown(ASK, {"role": "assistant", "content": "Two, longer."}) in surface.prompts[-1]


async def test_a_stop_text_may_be_shown_and_kept(surface, session):
    surface.answers = ["Paris. Not Rome."]
    turn = await session.turn("planner", messages=[ASK], stop=[" Not"], include_stop_str_in_output=True)
    assert turn.text == "Paris. Not"
    assert (await said(surface, session)).endswith(OPENING + "Paris. Not")


async def test_a_turn_is_taken_only_after_as_many_as_are_expected(surface, session):
    await session.turn("planner", messages=[ASK], expected_turns=0)
    with pytest.raises(Conflict, match="has had 1 turns, not 0") as raised:
        await session.turn("planner", messages=[ASK], expected_turns=0)
    assert raised.value.field == "expected_turns"
    assert (await session.turn("planner", messages=[ASK], expected_turns=1)).turns == 2


async def test_a_truncated_session_goes_on_from_there_over_both_surfaces_and_its_fork_stays(surface, session):
    surface.answers = ["Paris.", "Rome."]
    first = await session.turn("planner", messages=[ASK])
    before = await said(surface, session)
    await session.turn("planner", messages=[{"role": "user", "content": "And of Italy?"}])
    fork = await session.fork()
    whole = await said(surface, session)
    changed = await session.update(truncate_to=first.context_tokens)
    assert (changed.context_tokens, changed.turns) == (first.context_tokens, 2)
    assert (await said(surface, session), await said(surface, fork)) == (before, whole)
    history = [ASK, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Spain?"}]
    headers = {"x-prefillshare-session": session.session_id}
    response = await surface.http.post("/v1/chat/completions", json={"model": "coder", "messages": history}, headers=headers)
    assert response.headers["x-prefillshare-session-state"] == "continued"
    assert surface.prompts[-1] == before + "\n" + shown(history[-1]) + OPENING
    await fork.turn("coder", messages=[history[-1]])
    assert surface.prompts[-1] == whole + "\n" + shown(history[-1]) + OPENING
    await fork.delete()


async def test_what_is_cut_off_inside_a_message_is_closed_before_the_next(surface, session):
    turn = await session.turn("planner", messages=[ASK])
    response = len(turn.token_ids)
    await session.update(truncate_to=turn.context_tokens - response + 1)
    await session.turn("planner", messages=[ASK])
    assert OPENING + "Par" in surface.prompts[-1]
    assert f"<|im_end|>\n{shown(ASK)}{OPENING}" in surface.prompts[-1]
    asked = len(surface.tokenizer.encode(DEFAULT + shown(ASK), add_special_tokens=False))
    await session.update(truncate_to=asked)
    await session.turn("planner", messages=[ASK])
    assert surface.prompts[-1] == DEFAULT + shown(ASK, ASK) + OPENING
    await session.update(truncate_to=0)
    await session.turn("planner", messages=[ASK])
    assert surface.prompts[-1] == DEFAULT + shown(ASK) + OPENING


async def test_what_cannot_be_changed_is_refused_with_the_field(surface, session):
    wrong = [{}, {"truncate_to": 1}, {"truncate_to": -1}, {"ttl_s": -1}, {"ttl_s": 101}, {"ttl_s": float("nan")}]
    for changes in wrong:
        with pytest.raises(InvalidInput) as raised:
            await session.update(**changes)
        assert raised.value.field == next(iter(changes), "truncate_to")
    async with surface.sessions.turn(session.session_id, tenant=""):
        with pytest.raises(SessionBusy):
            await session.update(truncate_to=0)
        assert (await session.update(ttl_s=5)).busy
    with pytest.raises(NotFound):
        await surface.client.session("nobody's").update(truncate_to=0)


async def test_a_session_lives_as_long_as_it_is_told(surface):
    session = await surface.client.create_session("short", ttl_s=5)
    assert 4 < (await session.get()).expires_in_s <= 5
    assert (await (await session.fork("its fork")).get()).ttl_s == 5
    assert (await session.update(ttl_s=50)).ttl_s == 50
    assert (await session.update(ttl_s=0)).ttl_s == 100
    await session.delete()
    await surface.client.session("its fork").delete()


async def test_sessions_are_listed_and_a_name_in_use_is_said_to_be(surface, session):
    await session.turn("planner", messages=[ASK])
    await surface.client.create_session("named", text="notes")
    for make in (surface.client.create_session("named"), session.fork("named")):
        with pytest.raises(AlreadyExists, match="exists already") as raised:
            await make
        assert raised.value.__cause__.code() is grpc.StatusCode.ALREADY_EXISTS
    listed = {one.session_id: one async for one in surface.client.sessions(page_size=1)}
    assert {session.session_id, "named"} <= listed.keys()
    mine = listed[session.session_id]
    assert (mine.turns, mine.context_tokens) == (1, (await session.get()).context_tokens)
    assert 0 < mine.expires_in_s <= 100
    with pytest.raises(InvalidInput) as raised:
        await surface.client._do(_page(page_size=-1))
    assert raised.value.field == "page_size"
    await surface.client.session("named").delete()


def _page(**given):
    from prefillshare.client.retries import Call

    return Call("ListSessions", pb.ListSessionsRequest(**given))


async def test_an_unknown_role_is_refused_alike_over_both_surfaces(surface, session):
    with pytest.raises(InvalidInput) as raised:
        await session.turn("planner", messages=[ASK, {"role": "robot", "content": "x"}])
    assert raised.value.field == "input.messages.1.role"
