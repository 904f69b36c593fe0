"""Bad input, clients that leave and deadlines on the real small model: an error that says what to do, and nothing left."""

from __future__ import annotations

import time

import grpc
import httpx
import openai
import pytest
import yaml
from grpc_status import rpc_status

from prefillshare.client import Client
from prefillshare.kvshare import errors, metrics_text
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc
from smollm.conftest import DEPLOYMENT, ask

pytestmark = pytest.mark.engine

MAX_LEN = yaml.safe_load(DEPLOYMENT.read_text())["base"]["max_model_len"]


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
