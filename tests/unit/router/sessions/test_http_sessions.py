"""Chat-like HTTP calls on sessions: what is laid out behind a context, and what is kept. No engine runs."""

from __future__ import annotations

import json

import pytest
import pytest_asyncio
from surface_clients import started

from benchmarks.chats.surface import END, ChatSurface
from prefillshare.kvshare.errors import NotFound

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PLAN, CODE = ({"role": "system", "content": text} for text in ("You plan.", "You code."))
ASK, MORE = ({"role": "user", "content": text} for text in ("Capital of France?", "And of Italy?"))
SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
CALLED = '<tool_call>\n{"name": "look", "arguments": {"at": "map"}}\n</tool_call>'
OPENING = "<|im_start|>assistant\n"
#: What the demo model's template puts before conversations that have no system message.
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def shown(*messages) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def behind(smollm):
    async with started(ChatSurface(str(smollm))) as surface:
        yield surface


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def first(smollm):
    async with started(ChatSurface(str(smollm), own_prompt="first")) as surface:
        yield surface


@pytest.fixture(autouse=True)
def _anew(request):
    for name in {"behind", "first"} & set(request.fixturenames):
        surface = request.getfixturevalue(name)
        surface.answers, surface.prompts = ["Yes."], []


async def chat(surface, session, messages, decoder="planner", *, answer=None, **more):
    """Returns (message, how it was served)."""
    if answer:
        surface.answers = [answer]
    headers = {"x-prefillshare-session": session} if session else {}
    body = {"model": decoder, "messages": messages, "max_tokens": 50, **more}
    response = await surface.http.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    data = response.json()
    state = response.headers.get("x-prefillshare-session-state")
    assert data["kv_transfer_params"]["prefillshare"].get("session") == state
    return data["choices"][0]["message"], state


async def context(surface, session) -> str:
    return surface.tokenizer.decode((await surface.sessions.get(session, tenant="")).token_ids)


async def test_agents_with_different_prompts_share_all_that_was_said(behind):
    answer, state = await chat(behind, "shared", [PLAN, ASK], answer="Paris.")
    assert state == "begun"
    assert behind.prompts[-1] == DEFAULT + shown(("user", ASK["content"]), ("system", "You plan.")) + OPENING
    _, state = await chat(behind, "shared", [CODE, ASK, answer, MORE], "coder", answer="Rome.")
    said = DEFAULT + shown(("user", ASK["content"]), ("assistant", "Paris."), ("user", MORE["content"]))
    assert (state, behind.prompts[-1]) == ("continued", said + shown(("system", "You code.")) + OPENING)
    assert await context(behind, "shared") == said + OPENING + "Rome.<|im_end|>"


async def test_what_the_session_holds_is_not_tokenised_again(behind):
    """The answer's tokens are others than those its text becomes when it is tokenised."""
    odd = [token for letter in "Paris." for token in behind.encode(letter)]
    assert odd != behind.encode("Paris.")
    behind.answers, encode = ["Paris."], behind.encode
    behind.encode = lambda text: odd if text == "Paris." else encode(text)
    try:
        answer, _ = await chat(behind, "odd", [ASK])
        await chat(behind, "odd", [ASK, answer, MORE])
    finally:
        del behind.encode
    ids = ",".join(map(str, behind.ids[-1]))
    assert ",".join(map(str, [*odd, END])) in ids


async def test_tool_calls_go_on_as_they_were_generated(behind):
    spaced = CALLED.replace('": ', '":  ')
    answer, _ = await chat(behind, "tools", [ASK], answer=spaced, tools=[TOOL])
    assert json.loads(answer["tool_calls"][0]["function"]["arguments"]) == {"at": "map"}
    result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "Paris"}
    _, state = await chat(behind, "tools", [ASK, answer, result], tools=[TOOL])
    assert state == "continued"
    assert spaced in behind.prompts[-1]


async def test_a_call_whose_arguments_are_no_json_goes_on_as_it_was_generated(behind):
    broken = CALLED.replace('"map"', "")
    answer, _ = await chat(behind, "broken", [ASK], answer=broken, tools=[TOOL])
    assert answer["tool_calls"][0]["function"]["arguments"] == '{"at": }'
    result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "no JSON"}
    _, state = await chat(behind, "broken", [ASK, answer, result], tools=[TOOL])
    assert state == "continued"
    assert broken in behind.prompts[-1]


async def test_an_agents_own_part_is_laid_out_once_while_it_takes_turn_after_turn(behind):
    history = [PLAN, ASK]
    for number in range(3):
        answer, _ = await chat(behind, "loop", history, answer=CALLED, tools=[TOOL])
        result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": f"result {number}"}
        history += [answer, result]
        if number:
            assert behind.ids[-1][: len(behind.ids[-2])] == behind.ids[-2]
    assert behind.prompts[-1].count("You plan.") == 1
    assert behind.prompts[-1].startswith(DEFAULT + shown(("user", ASK["content"]), ("system", "You plan.")) + OPENING + CALLED)
    await chat(behind, "loop", [CODE, *history[1:]], "coder", answer="Done.", tools=[TOOL])
    assert "You plan." not in behind.prompts[-1]
    assert behind.prompts[-1].endswith(shown(("tool", "result 2"), ("system", "You code.")) + OPENING)
    assert "system" not in (await context(behind, "loop")).removeprefix(DEFAULT)


async def test_the_kv_made_ahead_is_of_what_the_next_turn_sees(behind):
    """Behind its own part where an agent goes on, as after a call; without it where another one may, as it did before."""
    answer, _ = await chat(behind, "ahead", [PLAN, ASK], answer="Paris.")
    assert "You plan." not in behind.tokenizer.decode(behind.kept[-1])
    await chat(behind, "ahead", [PLAN, ASK, answer, MORE], answer="Rome.")
    assert behind.kept[-1] == [*behind.ids[-1], *behind.encode("Rome."), END]
    await chat(behind, "ahead call", [PLAN, ASK], answer=CALLED, tools=[TOOL])
    assert behind.kept[-1] == [*behind.ids[-1], *behind.encode(CALLED), END]
    history = [PLAN, ASK]
    for agent in (PLAN, CODE):
        history[0] = agent
        answer, _ = await chat(behind, "ahead both", history, answer=CALLED, tools=[TOOL])
        history += [answer, {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "a result"}]
        answer, _ = await chat(behind, "ahead both", history, answer="Done.", tools=[TOOL])
        history += [answer, MORE]
        seen, kept = [*behind.ids[-1], *behind.encode("Done."), END], behind.kept[-1]
        context = (await behind.sessions.get("ahead both", tenant="")).token_ids
        assert kept == (seen if agent is PLAN else list(context))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([MORE, {"role": "assistant", "content": "Paris."}, MORE], "its messages do not begin with the 2 of the session"),
        ([ASK, {"role": "assistant", "content": "Rome."}, MORE], "its messages do not begin with the 2 of the session"),
        ([MORE], "its messages do not begin with the 2 of the session"),
    ],
)
async def test_another_history_is_served_as_it_is_and_leaves_the_session_alone(behind, messages, reason):
    session = f"history-{len(messages)}-{messages[0]['content']}-{messages[-1]['content']}"
    await chat(behind, session, [ASK], answer="Paris.")
    before = await context(behind, session)
    _, state = await chat(behind, session, [PLAN, *messages])
    assert state == f"as it is: {reason}"
    said = shown(*((message["role"], message["content"]) for message in messages))
    assert behind.prompts[-1] == shown(("system", "You plan.")) + said + OPENING
    assert await context(behind, session) == before


async def test_an_agent_goes_on_from_anothers_answer_although_nobody_has_said_anything_new(behind):
    answer, _ = await chat(behind, "graph", [PLAN, ASK], answer="Paris.")
    second, state = await chat(behind, "graph", [CODE, ASK, answer], "coder", answer="So be it.")
    said = DEFAULT + shown(("user", ASK["content"]), ("assistant", "Paris."))
    assert (state, behind.prompts[-1]) == ("continued", said + shown(("system", "You code.")) + OPENING)
    _, state = await chat(behind, "graph", [ASK, answer, second], answer="Good.")
    said += shown(("assistant", "So be it."))
    assert (state, behind.prompts[-1]) == ("continued", said + OPENING)
    assert await context(behind, "graph") == said + OPENING + "Good.<|im_end|>"


async def test_a_call_without_a_message_of_the_conversation_begins_no_session(behind):
    _, state = await chat(behind, "nothing said", [PLAN])
    assert state == "as it is: it has no message of the conversation"


async def test_a_call_meanwhile_is_served_as_it_is(behind):
    await behind.sessions.create("held", tenant="")
    async with behind.sessions.turn("held", tenant=""):
        _, state = await chat(behind, "held", [ASK])
    assert state == "as it is: another turn runs on the session"
    _, state = await chat(behind, "held", [ASK])
    assert state == "as it is: the session does not consist of chat messages only"


async def test_a_message_that_is_to_be_continued_is_served_as_it_is(behind):
    begun = [ASK, {"role": "assistant", "content": "Par"}]
    _, state = await chat(behind, "begun", begun, add_generation_prompt=False, continue_final_message=True)
    assert state == "as it is: the last message is to be continued"


@pytest.mark.parametrize("more", [{"n": 2}, {"use_beam_search": True}])
async def test_several_answers_are_refused(behind, more):
    body = {"model": "planner", "messages": [ASK], "max_tokens": 5, **more}
    response = await behind.http.post("/v1/chat/completions", json=body, headers={"x-prefillshare-session": "several"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(more))
    with pytest.raises(NotFound):
        await behind.sessions.get("several", tenant="")


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({}, 503),
        ({"temperature": -1}, 400),
        ({"structured_outputs": {"regex": "("}}, 400),
        ({"logit_bias": {"999999": 1}}, 400),
        ({"prompt_logprobs": 1}, 400),
        ({"max_tokens": 100_000}, 400),
        ({"messages": [PLAN]}, 200),
    ],
)
async def test_a_call_that_goes_on_in_no_session_leaves_none(behind, more, status):
    """The engine fails; what is asked for is refused; or nothing is said in the conversation."""
    headers = {"x-prefillshare-session": "nothing came of it"}
    behind.fails_at = 1 if status == 503 else 0
    try:
        body = {"model": "planner", "messages": [ASK], "max_tokens": 5, **more}
        answer = await behind.http.post("/v1/chat/completions", json=body, headers=headers)
    finally:
        behind.fails_at = 0
    assert answer.status_code == status, answer.text
    assert ("x-prefillshare-session-state" in answer.headers) == (status == 200)
    with pytest.raises(NotFound):
        await behind.sessions.get("nothing came of it", tenant="")


async def test_a_call_that_begins_a_session_holds_it_once(behind, monkeypatch):
    """The client's next call may come at once."""
    held, turn = [], behind.sessions.turn
    monkeypatch.setattr(behind.sessions, "turn", lambda *given, **how: held.append(given) or turn(*given, **how))
    await chat(behind, "once", [ASK])
    assert held == [("once",)]


async def test_a_session_that_had_been_created_stays_when_its_first_call_fails(behind):
    await behind.sessions.create("created", tenant="")
    body = {"model": "planner", "messages": [ASK], "temperature": -1}
    headers = {"x-prefillshare-session": "created"}
    assert (await behind.http.post("/v1/chat/completions", json=body, headers=headers)).status_code == 400
    assert (await behind.sessions.get("created", tenant="")).turns == 0


@pytest.mark.parametrize("most", [3, 500, -1])
async def test_a_session_is_not_truncated_by_a_call(behind, most):
    body = {"model": "planner", "messages": [ASK], "max_tokens": 5, "truncate_prompt_tokens": most}
    headers = {"x-prefillshare-session": "cut off"}
    response = await behind.http.post("/v1/chat/completions", json=body, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "truncate_prompt_tokens")
    assert behind.prompts == []
    with pytest.raises(NotFound):
        await behind.sessions.get("cut off", tenant="")


async def test_without_a_session_a_truncated_prompt_is_the_context_whose_kv_is_made_ahead(behind):
    await chat(behind, "", [ASK], answer="Paris.", truncate_prompt_tokens=3)
    assert len(behind.ids[-1]) == 3
    assert behind.kept[-1] == [*behind.ids[-1], *behind.encode("Paris."), END]


async def test_a_session_is_not_cut_off_where_it_does_not_fit(behind):
    async def respond(*messages):
        body = {"model": "planner", "input": list(messages), "truncation": "auto"}
        return await behind.http.post("/v1/responses", json=body, headers={"x-prefillshare-session": "fits"})

    assert (await respond(ASK)).headers["x-prefillshare-session-state"] == "begun"
    before = await context(behind, "fits")
    refused = await respond(ASK, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "word " * 1100})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "truncation")
    assert await context(behind, "fits") == before


@pytest.mark.parametrize("session", ["", "results"])
async def test_a_tool_result_without_its_call_is_refused(behind, session):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {"role": "assistant", "tool_calls": [call]}
    messages = [ASK, called, {"role": "tool", "tool_call_id": "c2", "content": "x"}]
    headers = {"x-prefillshare-session": session} if session else {}
    answer = await behind.http.post("/v1/chat/completions", json={"model": "planner", "messages": messages}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages.2.tool_call_id")
    messages[2]["tool_call_id"] = "c1"
    await chat(behind, session, messages)


async def test_nor_is_an_output_taken_without_its_call_where_a_response_goes_on_from_a_session(behind):
    output = {"type": "function_call_output", "call_id": "c2", "output": "x"}
    body, headers = {"model": "planner", "input": [ASK, output]}, {"x-prefillshare-session": "outputs"}
    answer = await behind.http.post("/v1/responses", json=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input.1.call_id")


async def test_what_no_response_does_is_refused_in_our_words_on_a_session_too(behind):
    body, headers = {"model": "planner", "input": "hi", "background": True}, {"x-prefillshare-session": "background"}
    answer = await behind.http.post("/v1/responses", json=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], "vLLM" in error["message"]) == (400, "background", False)
    assert "responses are made while their clients wait" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/messages/count_tokens", {"messages": [ASK]}),
        ("/v1/chat/completions/batch", {"messages": [[ASK]]}),
        ("/tokenize", {"messages": [ASK]}),
        ("/v1/conversations", {}),
    ],
)
async def test_where_a_session_means_nothing_its_header_is_ignored(behind, path, body):
    """Clients set it once, for all their calls."""
    body = {"model": "planner", **body} if body else body
    response = await behind.http.post(path, json=body, headers={"x-prefillshare-session": "s" * 200})
    assert (response.status_code, "x-prefillshare-session-state" in response.headers) == (200, False), response.text
    with pytest.raises(NotFound):
        await behind.sessions.get("s" * 200, tenant="")


async def test_a_session_of_any_name_can_be_named(behind):
    from prefillshare.router.sessions.transcript import Transcript

    name = "Z\N{LATIN SMALL LETTER U WITH DIAERESIS}rich \N{MOUNTAIN}"
    await behind.sessions.create(name, tenant="", transcript=Transcript())
    headers, body = {"x-prefillshare-session": name.encode()}, {"model": "planner", "messages": [ASK]}
    response = await behind.http.post("/v1/chat/completions", json=body, headers=headers)
    assert (response.status_code, (await behind.sessions.get(name, tenant="")).turns) == (200, 1)


@pytest.mark.parametrize("name", ["Z\N{LATIN SMALL LETTER U WITH DIAERESIS}rich".encode("latin-1"), b"s" * 129])
async def test_a_name_that_is_none_is_refused_under_the_headers_name(behind, name):
    body = {"model": "planner", "messages": [ASK]}
    response = await behind.http.post("/v1/chat/completions", json=body, headers={"x-prefillshare-session": name})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-prefillshare-session")


async def test_a_session_that_began_with_a_system_message_goes_on_with_it(behind):
    from prefillshare.router.sessions.transcript import Transcript

    said = shown(("system", "You plan."), ("user", ASK["content"]))
    await behind.sessions.create("kept", behind.encode(said), tenant="", transcript=Transcript().with_messages([PLAN, ASK]))
    _, state = await chat(behind, "kept", [PLAN, ASK, MORE])
    assert (state, behind.prompts[-1]) == ("continued", said + shown(("user", MORE["content"])) + OPENING)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"system": "You plan.", "messages": [ASK], "max_tokens": 9}),
        ("/v1/responses", {"instructions": "You plan.", "input": ASK["content"]}),
    ],
)
async def test_the_other_chat_surfaces_go_on_in_the_same_way(behind, path, body):
    await behind.http.post(path, json={"model": "planner", **body}, headers={"x-prefillshare-session": path})
    said = DEFAULT + shown(("user", ASK["content"]))
    assert behind.prompts[-1] == said + shown(("system", "You plan.")) + OPENING
    answer = {"role": "assistant", "content": "Yes."}
    _, state = await chat(behind, path, [CODE, ASK, answer, MORE], "coder")
    assert state == "continued"
    assert behind.prompts[-1].startswith(said + shown(("assistant", "Yes."), ("user", MORE["content"])))


async def test_streamed_or_not_the_session_keeps_the_same(behind):
    contexts = []
    for stream in (False, True):
        body = {"model": "planner", "messages": [ASK], "stream": stream, "tools": [TOOL]}
        session, behind.answers = f"stream-{stream}", [CALLED]
        headers = {"x-prefillshare-session": session}
        response = await behind.http.post("/v1/chat/completions", json=body, headers=headers)
        assert response.headers["x-prefillshare-session-state"] == "begun"
        kept = await behind.sessions.get(session, tenant="")
        contexts.append((kept.token_ids, kept.transcript, kept.open_response))
    assert contexts[0] == contexts[1]


async def test_what_a_stop_text_cut_off_is_not_kept(behind):
    await chat(behind, "stop", [ASK], answer="Paris. Not Rome.", stop=[" Not"])
    assert (await context(behind, "stop")).endswith(OPENING + "Paris.")


async def test_own_prompts_first_share_among_agents_with_the_same(first):
    answer, state = await chat(first, "same", [PLAN, ASK], answer="Paris.")
    assert (state, first.prompts[-1]) == ("begun", shown(("system", "You plan."), ("user", ASK["content"])) + OPENING)
    answer, state = await chat(first, "same", [PLAN, ASK, answer, MORE], "coder")
    assert state == "continued"
    _, state = await chat(first, "same", [CODE, ASK, answer, MORE], "coder")
    assert state == "as it is: its messages do not begin with the 5 of the session"
