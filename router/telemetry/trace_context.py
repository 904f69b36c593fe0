"""The caller's trace on both surfaces: a W3C traceparent in gRPC metadata or HTTP headers is continued by the turn's spans."""

from __future__ import annotations

import grpc
from opentelemetry.context import attach, detach
from starlette.datastructures import Headers

from prefillshare.kvshare.tracing import sent_with


class GrpcTraces(grpc.aio.ServerInterceptor):
    """Interceptor and handler run in one context per call: what is attached here is current in the handler."""

    async def intercept_service(self, continuation, handler_call_details):
        attach(sent_with(dict(handler_call_details.invocation_metadata or ())))
        return await continuation(handler_call_details)


class HttpTraces:
    """ASGI middleware."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        token = attach(sent_with(Headers(scope=scope)))
        try:
            await self._app(scope, receive, send)
        finally:
            detach(token)
