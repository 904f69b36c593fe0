"""Any message of each gRPC method, drawn by hypothesis: it is answered, or refused with a code that clients know and, if
something in it is wrong, with the field. No engine runs: turns answer what a test tells them."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_surface import GrpcSurface
from hypothesis import given
from hypothesis import strategies as st
from keeping_surface import KeepingSurface
from mutations import LOOKED_AT
from protobuf_messages import messages

from prefillshare.client.failures import typed
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb

pytestmark = pytest.mark.slow

SERVICE = pb.DESCRIPTOR.services_by_name["PrefillShare"]
METHODS = [method.name for method in SERVICE.methods if method.name != "GetReadiness"]
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.ABORTED,
    grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED,
}  # fmt: skip
TIMEOUT_S = 20
SESSION = "known"


class Surface(GrpcSurface, KeepingSurface):
    """One on which contexts are kept, too."""


@pytest.fixture(scope="module")
def call(smollm):
    """call(method, message) -> its answers."""
    with asyncio.Runner() as runner:
        surface = Surface(str(smollm))
        runner.run(surface.start())
        surface.answers = ["Paris."]

        async def called(method: str, message) -> list:
            async with grpc.aio.insecure_channel(surface.grpc_address) as channel:
                kind = SERVICE.methods_by_name[method]
                answer = getattr(pb, kind.output_type.name).FromString
                many = channel.unary_stream if kind.server_streaming else channel.unary_unary
                ask = many(f"/{SERVICE.full_name}/{method}", type(message).SerializeToString, answer)
                asked = ask(message, timeout=TIMEOUT_S)
                return [one async for one in asked] if kind.server_streaming else [await asked]

        runner.run(called("CreateSession", pb.CreateSessionRequest(session_id=SESSION)))
        yield lambda method, message: runner.run(called(method, message))
        runner.run(surface.stop())


@pytest.mark.parametrize("method", METHODS)
def test_any_message_is_answered_or_refused(call, method):
    kind = getattr(pb, SERVICE.methods_by_name[method].input_type.name)

    @LOOKED_AT
    @given(messages(kind), st.booleans())
    def asked(message, is_known):
        if is_known:  # of a session that there is, and a decoder
            for field, name in (("session_id", SESSION), ("decoder", "planner")):
                if field in kind.DESCRIPTOR.fields_by_name and not method.startswith(("Create", "Delete")):
                    setattr(message, field, name)
        try:
            call(method, message)
        except grpc.aio.AioRpcError as refusal:
            error = refusal
        else:
            return
        assert error.code() in REFUSALS, error
        if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
            assert typed(error).field, error

    asked()
