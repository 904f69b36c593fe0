"""The span that contains a turn's other spans (docs/operations.md: traces)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry.trace import SpanKind

from prefillshare.kvshare import tracing

if TYPE_CHECKING:
    from prefillshare.router.turn.turn import Turn


@contextmanager
def turn_span(turn: Turn) -> Iterator[None]:
    """The turn's span. At its end it gets attributes that say what the turn cost."""
    usage = turn.usage
    asked = {"gen_ai.request.model": turn.decoder.name, "prefillshare.request_id": turn.call.request_id}
    with tracing.span("turn", kind=SpanKind.SERVER, **asked) as turn.span:
        try:
            yield
        finally:
            turn.span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "prefillshare.cached_tokens": usage.cached_tokens,
                    "prefillshare.kv_bytes": usage.kv_bytes,
                    "prefillshare.resumes": usage.resumes,
                }
            )
