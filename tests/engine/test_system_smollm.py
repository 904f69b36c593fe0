"""The golden path on the real small model: the oracle over gRPC, OpenAI clients over HTTP, bad input, clients that leave."""

from __future__ import annotations

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from conftest import System, system
from grpc_status import rpc_status
from oracle import TOLERANCE
from transformers import AutoTokenizer

from prefillshare import demo
from prefillshare.client import Client
from prefillshare.finetuning import subjects
from prefillshare.finetuning.evaluate import offline_answers, served_answers
from prefillshare.finetuning.tasks import TASKS
from prefillshare.finetuning.transcripts import stop_ids
from prefillshare.kvshare import errors, metrics_text
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc
from prefillshare.seeded_adapters import make_seeded_adapters

pytestmark = pytest.mark.engine

SHIPPED = Path(__file__).parents[2] / "adapters"
BLOCK = 32
MAX_LEN = 1536
QUESTIONS = (
    "Plan a small web shop.",
    "Write the first function.",
    "Which tools do you need?",
    "What is missing?",
    "Sum it up.",
)


@pytest.fixture(scope="module")
def running(tmp_path_factory, smollm):
    adapters = make_seeded_adapters(smollm, tmp_path_factory.mktemp("adapters"), names=("planner", "coder"))
    adapters |= {name: SHIPPED / name for name in ("tools", "arithmetic")}
    with system(
        {
            "base": {
                "model": str(smollm),
                "dtype": "float32",
                "max_model_len": MAX_LEN,
                "block_size": BLOCK,
                "tool_call_parser": "hermes",
            },
            "prefill": {"kv_cache_gib": 0.25, "cpu_cores": "0"},
            "decode": [
                {
                    "pool": "agents",
                    "kv_cache_gib": 0.25,
                    "cpu_cores": "1",
                    "max_lora_rank": 8,
                    "local_prefill": "never",
                    "adapters": {name: str(path) for name, path in adapters.items()},
                }
            ],
            "router": {"max_queued": 12},
            "cluster": {"kv_lease_s": 20},
        }
    ) as it:
        yield it


@pytest.fixture(scope="module")
def http(running: System) -> openai.OpenAI:
    with openai.OpenAI(base_url=running.http_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# The oracle ---------------------------------------------------------------------------------------------------------


def test_one_turn_is_exact_and_the_oracle_tells_sharing_from_own_prefill(running, oracle):
    result, prompt = oracle.turn(running.client.create_session(), "planner", messages=ask(QUESTIONS[0]), max_tokens=16)
    own = oracle.diff("planner", prompt, result.token_ids, result.logprobs, mode="none")
    assert own > 100 * TOLERANCE


def test_the_offline_evaluation_gives_the_served_answers(running, smollm):
    """So docs/accuracy.md scores what is served."""
    task = copy.copy(TASKS["bfcl_multiple"])
    task.max_tokens = 24
    questions, tokenizer = task.questions()[:2], AutoTokenizer.from_pretrained(smollm)
    adapter = Path(running.deployment.decode[0].adapters["planner"])
    subject = subjects.load("planner", smollm, adapter, "prefillshare")
    offline = offline_answers(subject, task, questions, tokenizer, stop_ids=stop_ids(smollm, tokenizer))
    assert all(offline)
    assert served_answers(running.client, "planner", task, questions, at_once=2) == offline


def test_the_shipped_adapters_do_what_the_base_cannot(running, oracle):
    """In the demo's session, two trained decoders take turns over one context; the base is asked their first questions, too."""
    session, asked = running.client.create_session(messages=[{"role": "system", "content": demo.BRIEF}]), set()
    for turn in demo.TURNS:
        if turn.wanted is None:
            continue
        fork, what = session.fork(), {"messages": turn.messages, "temperature": 0.0}
        result, _ = oracle.turn(session, turn.decoder, **what, max_tokens=128)
        assert turn.is_right(result.text), result.text
        if turn.decoder not in asked:
            asked.add(turn.decoder)
            assert not turn.is_right(fork.turn("base", **what, max_tokens=64).text)
    assert asked == {"tools", "arithmetic"}


def test_five_turns_of_three_decoders_prefill_only_what_is_new(running, oracle):
    session = running.client.create_session()
    computed, new, known = 0, 0, 0
    for decoder, question in zip(("planner", "coder", "tools", "planner", "coder"), QUESTIONS, strict=True):
        result, prompt = oracle.turn(session, decoder, messages=ask(question), max_tokens=24)
        computed += result.usage.computed_tokens
        new += len(prompt) - known
        known = len(prompt)
        assert result.usage.cached_tokens + result.usage.computed_tokens == len(prompt) - 1
    assert computed <= 1.05 * new + 5 * BLOCK
    assert session.get().turns == 5


def test_a_suffix_is_seen_but_not_kept_and_a_fork_goes_its_own_way(running, oracle):
    session = running.client.create_session(text="The ferry leaves at nine. " * 8)
    hint = oracle.tokenizer.encode(" Answer in French.", add_special_tokens=False)
    first, prompt = oracle.turn(session, "planner", text=" Who is on board?", suffix_ids=hint, max_tokens=12, ignore_eos=True)
    assert prompt[-len(hint) :] == hint
    kept = list(session.get(with_token_ids=True).token_ids)
    assert kept == prompt[: -len(hint)] + first.token_ids
    fork = session.fork()
    ours, _ = oracle.turn(session, "coder", text=" And then?", max_tokens=12, ignore_eos=True)
    theirs, _ = oracle.turn(fork, "tools", text=" What was before?", max_tokens=12, ignore_eos=True)
    assert theirs.usage.computed_tokens < BLOCK + 12
    assert (
        list(session.get(with_token_ids=True).token_ids)[: len(kept)]
        == list(fork.get(with_token_ids=True).token_ids)[: len(kept)]
    )
    assert ours.token_ids != theirs.token_ids


def test_two_adapters_on_one_prompt_at_once_are_exact(running, oracle):
    sessions = {
        name: running.client.create_session(text="One harbour, two ships, three captains. " * 10)
        for name in ("planner", "coder")
    }
    oracle.base, oracle.decoder("planner"), oracle.decoder("coder")  # load models before the race

    def take(name):
        return oracle.turn(sessions[name], name, text=" Go on:", max_tokens=20, ignore_eos=True)[0]

    with ThreadPoolExecutor(2) as pool:
        planner, coder = pool.map(take, sessions)
    assert planner.token_ids != coder.token_ids


def test_the_base_itself_is_served_exactly(running, oracle):
    result, _ = oracle.turn(
        running.client.create_session(), "base", messages=ask("What is the capital of France?"), max_tokens=12
    )
    assert "Paris" in result.text


def test_stop_text_ends_the_response_before_it_and_seeds_repeat(running, oracle):
    turn = running.client.create_session().turn
    free = turn("base", text="One, two, three,", max_tokens=24, temperature=0.0)
    word = free.text.split()[2]
    session = running.client.create_session()
    stopped = session.turn("base", text="One, two, three,", max_tokens=24, stop=[word])
    kept = list(session.get(with_token_ids=True).token_ids)
    assert oracle.tokenizer.decode(kept) == f"One, two, three,{stopped.text}"  # the next decoder does not read what was cut
    assert session.turn("coder", text=" And?", max_tokens=2).usage.prompt_tokens == len(kept) + len(
        oracle.tokenizer.encode(" And?", add_special_tokens=False)
    )
    assert stopped.text == free.text[: free.text.index(word)]
    assert stopped.finish_reason == "stop"
    assert stopped.usage.total_s >= stopped.usage.time_to_first_token_s > 0
    seeded = [
        running.client.create_session().turn("base", text="A poem:", max_tokens=12, temperature=1.0, seed=s, ignore_eos=True)
        for s in (3, 3, 4)
    ]
    assert seeded[0].token_ids == seeded[1].token_ids != seeded[2].token_ids


# HTTP ---------------------------------------------------------------------------------------------------------------


def test_openai_lists_base_and_decoders_as_models(http):
    assert {m.id for m in http.models.list().data} == {"base", "planner", "coder", "tools", "arithmetic"}


def test_openai_chat_equals_the_grpc_turn(running, http):
    want = running.client.create_session().turn("coder", messages=ask(QUESTIONS[1]), max_tokens=16)
    whole = http.chat.completions.create(model="coder", messages=ask(QUESTIONS[1]), max_tokens=16, temperature=0)
    pieces = list(
        http.chat.completions.create(
            model="coder",
            messages=ask(QUESTIONS[1]),
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
    asked = {"messages": ask(QUESTIONS[1]), "max_tokens": 16}
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


def test_openai_named_tool_call_gives_arguments_that_fit_its_schema(http):
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    done = http.chat.completions.create(
        model="tools",
        messages=ask("What is the weather in Bern?"),
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=64,
        temperature=0,
    )
    call = done.choices[0].message.tool_calls[0].function
    assert call.name == "get_weather"
    assert isinstance(json.loads(call.arguments), dict), call.arguments
    assert isinstance(json.loads(call.arguments)["city"], str)


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


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"decoder": "nobody", "text": "x"}, errors.NotFound, "decoder: unknown decoder 'nobody'"),
        ({"decoder": "", "text": "x"}, errors.InvalidInput, "decoder: no decoder is named"),
        ({"decoder": "base"}, errors.InvalidInput, "input: the context is empty"),
        ({"decoder": "base", "text": ""}, errors.InvalidInput, "input: the context is empty"),
        ({"decoder": "base", "messages": []}, errors.InvalidInput, "input.messages: no message is given"),
        ({"decoder": "base", "messages": [{"role": "boss", "content": "x"}]}, errors.InvalidInput, "input.messages.0.role"),
        ({"decoder": "base", "token_ids": [1, 49152]}, errors.InvalidInput, "input.token_ids: token id 49152 at position 1"),
        ({"decoder": "base", "token_ids": [-1]}, errors.InvalidInput, "token id -1 at position 0"),
        ({"decoder": "base", "token_ids": [5] * MAX_LEN}, errors.InvalidInput, f"input: {MAX_LEN} prompt tokens"),
        ({"decoder": "base", "text": "x", "max_tokens": MAX_LEN}, errors.InvalidInput, "sampling.max_tokens"),
        ({"decoder": "base", "text": "x", "temperature": -0.1}, errors.InvalidInput, "sampling.temperature"),
        ({"decoder": "base", "text": "x", "top_p": 0.0}, errors.InvalidInput, "sampling.top_p"),
        ({"decoder": "base", "text": "x", "logprobs": 21}, errors.InvalidInput, "sampling.logprobs"),
        ({"decoder": "base", "text": "x", "stop": [""]}, errors.InvalidInput, "sampling.stop"),
        ({"decoder": "base", "text": "x", "min_tokens": 300}, errors.InvalidInput, "sampling.min_tokens: 300 is more"),
        ({"decoder": "base", "text": "x" * 1_000_000}, errors.InvalidInput, "input.text: 1000000 characters"),
        ({"decoder": "base", "text": "x" * 3_000_000}, errors.InvalidInput, "raise router.max_request_bytes"),
    ],
)
def test_bad_turns_name_the_field_and_change_nothing(running, kwargs, error, text):
    session = running.client.create_session()
    with pytest.raises(error) as raised:
        session.turn(kwargs.pop("decoder"), **kwargs)
    assert text in str(raised.value)
    assert session.get().turns == 0


def test_unknown_and_deleted_sessions_are_not_found(running):
    session = running.client.create_session("mine")
    with pytest.raises(errors.Conflict, match="exists already"):
        running.client.create_session("mine")
    session.delete()
    with pytest.raises(errors.NotFound, match="session_id: no session 'mine'"):
        session.turn("base", text="x")


def test_errors_are_statuses_with_details(running):
    stub = pb_grpc.PrefillShareStub(grpc.insecure_channel(running.grpc_address))
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Generate(pb.GenerateRequest(session_id="none", decoder="base"), timeout=30))
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    packed, *_ = rpc_status.from_call(raised.value).details
    detail = pb.ErrorDetail()
    assert packed.Unpack(detail)
    assert (detail.kind, detail.field) == ("NotFound", "session_id")


@pytest.mark.parametrize(
    ("kwargs", "status", "text"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"model": "base", "max_tokens": MAX_LEN}, 400, "max_tokens"),
        ({"model": "base", "temperature": -1}, 400, "temperature"),
        ({"model": "base", "extra_body": {"prompt_logprobs": 1}}, 400, "prompt_logprobs"),
    ],
)
def test_bad_http_requests_get_a_status_and_the_field(http, kwargs, status, text):
    with pytest.raises(openai.APIStatusError) as raised:
        http.chat.completions.create(messages=ask("Hi"), **kwargs)
    assert raised.value.status_code == status
    assert text in str(raised.value)


def test_a_second_turn_on_a_busy_session_is_aborted(running):
    session = running.client.create_session()
    first = session.stream("base", text="Count:", max_tokens=200, ignore_eos=True)
    next(first)
    with pytest.raises(errors.Conflict, match="another turn runs"):
        session.turn("planner", text="x")
    first.close()
    running.wait_until_nothing_is_held()
    assert session.get().context_tokens == 0


def test_turns_beyond_the_queue_are_refused_with_a_retry_hint(running):
    held = [
        running.client.create_session().stream("base", text=f"Count {i}:", max_tokens=200, ignore_eos=True) for i in range(12)
    ]
    for stream in held:
        next(stream)
    with pytest.raises(errors.Overloaded) as raised:
        running.client.create_session().turn("base", text="x")
    assert raised.value.retry_after_s > 0
    with (
        openai.OpenAI(base_url=running.http_url, api_key="none", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as refused,
    ):
        client.chat.completions.create(model="base", messages=ask("Hi"), stream=True)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for stream in held:
        stream.close()
    running.wait_until_nothing_is_held()


# Clients that leave, deadlines --------------------------------------------------------------------------------------


def test_a_grpc_client_that_vanishes_leaves_nothing_behind(running):
    with Client(running.grpc_address, retries=None) as client:
        stream = client.create_session().stream("planner", text="A long story: " * 20, max_tokens=600, ignore_eos=True)
        next(stream)
        assert running.held()
    running.wait_until_nothing_is_held(10)


def test_an_http_client_that_vanishes_leaves_nothing_behind(running):
    body = {"model": "coder", "messages": ask("A long story: " * 20), "max_tokens": 600, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{running.http_url}/chat/completions", json=body, timeout=60) as response:
        assert next(response.iter_lines()).startswith("data:")
        assert running.held()
    running.wait_until_nothing_is_held(10)


def test_a_deadline_ends_the_turn_on_both_engines(running):
    session = running.client.create_session()
    started = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        session.turn("base", text="A long story: " * 20, max_tokens=600, ignore_eos=True, timeout_s=2)
    assert time.monotonic() - started < 10
    running.wait_until_nothing_is_held(10)
    assert session.get().turns == 0


def test_readiness_and_metrics_are_served(running):
    url = running.http_url.removesuffix("/v1")
    assert httpx.get(f"{url}/ready", timeout=60).json() == {"ready": True, "reason": ""}
    assert running.client.not_ready_because() == ""
    text = httpx.get(f"{url}/metrics", follow_redirects=True, timeout=30).text
    assert metrics_text.samples(text, "prefillshare_turns_total", decoder="planner", outcome="ok")
    assert metrics_text.samples(text, "prefillshare_prefill_tokens_total", decoder="planner", source="cached")
