"""The span that a turn's others stand in (docs/operations.md: traces)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import SpanKind

from kvshare import tracing
from kvshare.handoff import TurnContext


@contextmanager
def turn_span(name: str, request_id: str, context: TurnContext) -> Iterator[None]:
    """The turn's span, which tells at its end what the turn cost."""
    usage = context.usage
    asked = {"gen_ai.request.model": name, "prefillshare.request_id": request_id}
    with tracing.span("turn", kind=SpanKind.SERVER, **asked) as context.span:
        try:
            yield
        finally:
            context.span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "prefillshare.cached_tokens": usage.cached_tokens,
                    "prefillshare.kv_bytes": usage.kv_bytes,
                    "prefillshare.resumes": usage.resumes,
                }
            )
