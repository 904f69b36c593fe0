"""A collector of OpenTelemetry spans: receives OTLP over gRPC on a loopback port and keeps what it gets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Span:
    """Ids in hex; times in seconds since 1970."""

    trace: str
    id: str
    parent: str
    name: str
    service: str
    began: float
    ended: float
    attributes: dict[str, object]


class Collector(pb_grpc.TraceServiceServicer):
    def __init__(self, port: int):
        self.spans: list[Span] = []
        self._server = grpc.server(ThreadPoolExecutor(4))
        pb_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"127.0.0.1:{port}")

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.stop(1).wait()

    def Export(self, request, context):
        for resource in request.resource_spans:
            service = _plain(resource.resource.attributes).get("service.name", "")
            for scope in resource.scope_spans:
                self.spans += [
                    Span(
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.name,
                        service,
                        span.start_time_unix_nano / 1e9,
                        span.end_time_unix_nano / 1e9,
                        _plain(span.attributes),
                    )
                    for span in scope.spans
                ]
        return pb.ExportTraceServiceResponse()

    def of(self, trace: str) -> list[Span]:
        return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.began)


def _plain(attributes) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}
