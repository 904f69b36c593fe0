"""OpenAI's client on the real small model, and what the page shows of it."""

from __future__ import annotations

import json

import httpx
import pytest
from oracle import TOLERANCE

from smollm.conftest import OWN, ask

pytestmark = pytest.mark.engine

BLOCK = 32
QUESTION = "Write the first function."


def test_openai_lists_base_and_decoders_as_models(http):
    assert {m.id for m in http.models.list().data} - {OWN} == {"base", "planner", "coder", "tools", "arithmetic"}


def test_openai_chat_equals_the_grpc_turn(running, http):
    want = running.client.create_session().turn("coder", messages=ask(QUESTION), max_tokens=16)
    whole = http.chat.completions.create(model="coder", messages=ask(QUESTION), max_tokens=16, temperature=0)
    pieces = list(
        http.chat.completions.create(
            model="coder",
            messages=ask(QUESTION),
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert whole.choices[0].message.content == want.text
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == want.text
    assert whole.usage.prompt_tokens == want.usage.prompt_tokens == pieces[-1].usage.prompt_tokens
    assert whole.usage.prompt_tokens_details.cached_tokens == pieces[-1].usage.prompt_tokens_details.cached_tokens > 0
    usage = whole.kv_transfer_params["prefillshare"]
    assert usage["computed_tokens"] + usage["cached_tokens"] == usage["prompt_tokens"] - 1 == whole.usage.prompt_tokens - 1
    assert usage["completion_tokens"] == whole.usage.completion_tokens
    assert usage["decode_replica"] == want.usage.decode_replica
    assert usage["total_s"] >= usage["time_to_first_token_s"] > 0


def test_the_page_shows_what_each_decoder_found_cached_and_where_it_ran(running, http):
    session, turns = running.client.create_session("on the page", text="The harbour opens at six. " * 20), []
    for decoder in ("planner", "coder"):
        turns.append(session.turn(decoder, text=" And then?", max_tokens=8, ignore_eos=True).usage)
    first = ask("The harbour closes at ten. " * 20)
    said = http.chat.completions.create(model="tools", messages=first, max_tokens=8)
    history = [*first, {"role": "assistant", "content": said.choices[0].message.content}, *ask("And on Sundays?")]
    http.chat.completions.create(model="arithmetic", messages=history, max_tokens=8)
    on = {"extra_headers": {"x-prefillshare-session": "over http"}, "max_tokens": 8}
    said_on = http.chat.completions.create(model="planner", messages=first, **on).choices[0].message
    http.chat.completions.create(model="coder", messages=[*first, said_on, *ask("And now?")], **on)
    with httpx.Client(base_url=running.http_url.removesuffix("/v1")) as page:
        assert page.get("/ui").text.startswith("<!doctype html>")
        told = page.get("/ui/data").json()
        refused = page.get("/ui/data", headers={"host": "rebound.example"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "host")
    shown = [turn for turn in told["turns"] if turn["session"] == "on the page"]
    assert [turn["decoder"] for turn in shown] == ["planner", "coder"]
    for turn, usage in zip(shown, turns, strict=True):
        for figure in ("prompt_tokens", "cached_tokens", "computed_tokens", "completion_tokens", "decode_replica"):
            assert turn[figure] == getattr(usage, figure), figure
        assert (turn["outcome"], turn["prefill_choice"]) == ("ok", "there: policy")
    assert shown[1]["cached_tokens"] > shown[0]["prompt_tokens"] - BLOCK
    held = [turn for turn in told["turns"] if turn["session"] == "over http"]
    assert [turn["decoder"] for turn in held] == ["planner", "coder"]
    assert held[1]["cached_tokens"] > held[0]["prompt_tokens"] - BLOCK
    calls = [turn for turn in told["turns"] if said.id in turn["request"] or turn["decoder"] == "arithmetic"][-2:]
    assert calls[0]["lane"] == calls[1]["lane"], "the second call continues the first"
    assert [pool["pool"] for pool in told["pools"]] == ["prefill", "agents"]
    replicas = [replica for pool in told["pools"] for replica in pool["replicas"]]
    assert {shown[1]["prefill_replica"], shown[1]["decode_replica"]} == {replica["replica"] for replica in replicas}
    assert all(replica["blocks_total"] > 0 and replica["usable"] for replica in replicas)


def test_openai_usage_is_whole_where_a_stop_string_ends_the_turn(running, http):
    asked = {"messages": ask(QUESTION), "max_tokens": 16}
    stop = running.client.create_session().turn("coder", **asked).text[4:9]
    answer = http.chat.completions.create(model="coder", **asked, temperature=0, stop=[stop])
    usage = answer.kv_transfer_params["prefillshare"]
    assert 0 < usage["completion_tokens"] < 16
    assert usage["completion_tokens"] == answer.usage.completion_tokens


def test_openai_completions_take_token_ids_and_give_logprobs(http, oracle):
    prompt = oracle.tokenizer.encode("The sea is blue because", add_special_tokens=False)
    done = http.completions.create(
        model="planner", prompt=prompt, max_tokens=8, temperature=0, logprobs=2, extra_body={"return_token_ids": True}
    )
    choice = done.choices[0]
    assert oracle.diff("planner", prompt, choice.token_ids, choice.logprobs.token_logprobs) <= TOLERANCE
    assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs)


def test_openai_n_choices_of_one_prompt(http):
    done = http.chat.completions.create(
        model="base", messages=ask("Name a colour."), n=2, max_tokens=6, temperature=1.0, seed=1
    )
    assert len(done.choices) == 2


def test_openai_json_schema_holds(http):
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "boolean"}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    done = http.chat.completions.create(
        model="planner",
        messages=ask("Is water wet?"),
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}},
    )
    assert isinstance(json.loads(done.choices[0].message.content)["answer"], bool)
