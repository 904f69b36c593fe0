"""What vLLM refuses is an error of ours that names the field, and what hangs on the request is let go. The engine is a fake."""

from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import MaxQueuedTokensError, VLLMNotFoundError, VLLMValidationError

from prefillshare.kvshare.decode_request import DecodeRequest
from prefillshare.kvshare.errors import ContractMismatch, Internal, InvalidInput, Overloaded, PrefixLost, Unavailable
from prefillshare.kvshare.handoff import Handoff
from prefillshare.kvshare_vllm.engine.decode_engine import DecodeEngine
from prefillshare.kvshare_vllm.engine.prefill_engine import PrefillEngine
from prefillshare.kvshare_vllm.sampling import make_sampling_params

SETTINGS = SimpleNamespace(
    mode="prefillshare", contract="ours", role="decode", pool="agents", block_size=32, lease_s=20, makes_base_kv=False
)
REFUSALS = [
    (VLLMValidationError("too many", parameter="logprobs", value=6), InvalidInput, "logprobs"),
    (VLLMValidationError("too long"), InvalidInput, None),
    (VLLMNotFoundError("no such adapter"), InvalidInput, None),
    (MaxQueuedTokensError(), Overloaded, None),
]


class Vllm:
    """An engine that raises this before it has seen the request. `released`: transfers nobody will read."""

    def __init__(self, raises):
        self._raises, self.released = raises, []

    async def generate(self, *args, **kwargs):
        raise self._raises
        yield

    async def notify_kv_transfer_request_rejected(self, request_id, params):
        self.released.append((request_id, params))


def handoff(tokens=3, contract="ours"):
    return Handoff(tokens, contract, 20, {"remote_block_ids": [[1]], "remote_engine_id": "p"})


async def decode(vllm, given, **kw):
    engine = DecodeEngine(SETTINGS, vllm, None, None, None)
    return [chunk async for chunk in engine.decode(asked(given, **kw))]


def asked(given, **kw) -> DecodeRequest:
    return DecodeRequest("r", [1, 2, 3, 4], given, SamplingParams(), **kw)


@pytest.mark.parametrize(("raised", "kind", "field"), REFUSALS)
async def test_a_turn_that_vllm_refuses_says_why_and_its_handoff_is_released(raised, kind, field):
    vllm = Vllm(raised)
    with pytest.raises(kind) as caught:
        await decode(vllm, handoff())
    assert caught.value.field == field
    assert caught.value.message == raised.args[0]
    assert [request for request, _ in vllm.released] == ["r"]


@pytest.mark.parametrize(("raised", "kind", "field"), REFUSALS)
async def test_a_loan_whose_pull_vllm_refuses_is_given_back(raised, kind, field):
    vllm = Vllm(raised)
    with pytest.raises(kind):
        await PrefillEngine(SETTINGS, vllm, None, None, None).pull([1, 2, 3], handoff(), "r")
    assert [request for request, _ in vllm.released] == ["r"]


@pytest.mark.parametrize(
    ("given", "kw", "kind"),
    [
        (handoff(contract="theirs"), {}, ContractMismatch),
        (handoff(tokens=2), {}, Internal),
        (handoff(), {"adapter": "nobody's"}, Internal),
    ],
)
async def test_a_handoff_that_does_not_fit_is_released(given, kw, kind):
    vllm = Vllm(None)
    with pytest.raises(kind):
        await decode(vllm, given, **kw)
    assert [request for request, _ in vllm.released] == ["r"]


async def test_a_call_that_was_given_up_before_it_came_never_begins():
    vllm = Vllm(AssertionError("it has begun"))
    engine = DecodeEngine(SETTINGS, vllm, None, None, None)
    await engine.give_up(handoff(), "r")
    assert [request for request, _ in vllm.released] == ["r"]
    with pytest.raises(Unavailable, match="r was given up before it came"):
        [chunk async for chunk in engine.decode(asked(handoff()))]
    assert len(vllm.released) == 1


async def test_a_call_that_has_begun_is_not_given_up():
    vllm = Vllm(VLLMValidationError("refused"))
    engine = DecodeEngine(SETTINGS, vllm, None, None, None)
    with pytest.raises(InvalidInput):
        [chunk async for chunk in engine.decode(asked(handoff()))]
    await engine.give_up(handoff(), "r")
    assert len(vllm.released) == 1


async def test_what_is_no_refusal_releases_nothing():
    """The engine has the request, or is dead: either ends the lease."""
    vllm = Vllm(Unavailable("dead"))
    with pytest.raises(Unavailable):
        await decode(vllm, handoff())
    assert vllm.released == []


def test_sampling_that_vllm_refuses_names_the_field():
    with pytest.raises(InvalidInput) as caught:
        make_sampling_params(temperature=3.0)
    assert caught.value.field == "temperature"


async def test_a_request_that_ends_in_an_error_is_closed_while_somebody_still_holds_the_error():
    """Errors travel with their frames: what closes only when those go would hold KV until then."""
    closed = []

    class GivesBack(Vllm):
        async def generate(self, *args, **kwargs):
            try:
                completion = SimpleNamespace(finish_reason="error", token_ids=[], logprobs=None)
                yield SimpleNamespace(outputs=[completion], kv_transfer_params={"resume_reason": "preempted"})
            finally:
                closed.append(True)

    engine = DecodeEngine(SETTINGS, GivesBack(None), None, None, None)
    with pytest.raises(PrefixLost) as caught:
        [chunk async for chunk in engine.decode(asked(handoff()))]
    assert caught.value.__traceback__ is not None
    assert closed == [True]
    assert engine._active == 0
