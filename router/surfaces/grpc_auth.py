"""API keys on the gRPC surface: every call but health and reflection carries one, and runs as its tenant."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.errors import Unauthenticated
from prefillshare.router.surfaces.grpc_errors import abort
from prefillshare.router.tenants import Tenants, bearer

#: Services that take no key.
OPEN = (health.SERVICE_NAME, reflection.SERVICE_NAME)


class ApiKeys(grpc.aio.ServerInterceptor):
    """Interceptor and handler run in one context per call (grpc.aio.ServerInterceptor): the handler sees what is set here."""

    def __init__(self, tenants: Tenants):
        self._tenants = tenants

    async def intercept_service(self, continuation, handler_call_details):
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.removeprefix("/").partition("/")[0]
        if handler is None or service in OPEN:
            return handler
        try:
            metadata = dict(handler_call_details.invocation_metadata or ())
            current_caller.set(self._tenants.identify(bearer(metadata.get("authorization"))))
        except Unauthenticated as error:
            return _refusal(handler, error)
        return handler


def _refusal(handler: grpc.RpcMethodHandler, error: Unauthenticated) -> grpc.RpcMethodHandler:
    """A handler of the same shape that only refuses."""

    async def whole(request, context):
        await abort(context, error)

    async def stream(request, context):
        await abort(context, error)
        yield

    shapes = {
        (False, False): (grpc.unary_unary_rpc_method_handler, whole),
        (False, True): (grpc.unary_stream_rpc_method_handler, stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, whole),
        (True, True): (grpc.stream_stream_rpc_method_handler, stream),
    }
    make, refuse = shapes[handler.request_streaming, handler.response_streaming]
    return make(refuse, handler.request_deserializer, handler.response_serializer)
