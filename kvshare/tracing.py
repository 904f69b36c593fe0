"""OpenTelemetry spans of a turn, in W3C trace context: from the caller, through the router, to the engines.

Spans are never made "current", because a turn is a generator that is resumed in the context of its consumer. They are passed on
explicitly instead. If tracing has not been set up, they record nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context, get_current
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from prefillshare.kvshare.config import Tracing

_W3C = TraceContextTextMapPropagator()
#: Most spans that wait to be exported; further ones are dropped.
QUEUE = 4096


def set_up(config: Tracing, service: str, instance: str):
    """Have this process's spans exported. Returns the provider; shutting it down at the end exports what is left."""
    from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    if config.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    resource = Resource.create({SERVICE_NAME: service, SERVICE_INSTANCE_ID: instance})
    provider = TracerProvider(resource=resource, sampler=ParentBasedTraceIdRatio(config.sample_share))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.otlp_endpoint), max_queue_size=QUEUE))
    trace.set_tracer_provider(provider)
    return provider


def sent_with(headers: Mapping[str, str]) -> Context:
    """The caller's trace, if it sent one. `headers`: names in lower case."""
    return _W3C.extract(headers)


@contextmanager
def span(
    name: str, within: Context | None = None, kind: SpanKind = SpanKind.INTERNAL, **attributes: str | float
) -> Iterator[Span]:
    """A span in `within`; None: in the current context, which has the caller's trace. The span records exceptions."""
    made = trace.get_tracer("prefillshare").start_span(name, within or get_current(), kind, attributes)
    try:
        yield made
    except Exception as error:
        made.record_exception(error)
        made.set_status(Status(StatusCode.ERROR, str(error)))
        raise
    finally:
        made.end()


def inside(of: Span) -> Context:
    return trace.set_span_in_context(of)


def headers(of: Span) -> dict[str, str] | None:
    """Headers for a call that continues the trace; None if there is none."""
    if not of.is_recording():
        return None
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, inside(of))
    return carrier


def past(name: str, within: Context, began_ns: int, seconds: float, **attributes: str | float) -> None:
    """Make a span that has already ended, `seconds` after `began_ns` (time.time_ns)."""
    made = trace.get_tracer("prefillshare").start_span(name, within, attributes=attributes, start_time=began_ns)
    made.end(began_ns + int(seconds * 1e9))
