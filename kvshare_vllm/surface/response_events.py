"""Responses end as OpenAI's API documents it, streamed or not, where vLLM's end otherwise.

- A stream that max_output_tokens cuts off ends with `response.incomplete`; vLLM's ends with `response.completed`.
- The item in which an answer was cut off is `incomplete`; vLLM's items are all `completed`. A function call whose arguments had
  come to their end is whole, wherever the answer ends behind it.

Seam: vllm/entrypoints/openai/responses/{serving,streaming_events}.py

Goes when: vLLM ends responses that were cut off in this way.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from openai.types.responses import ResponseFunctionToolCall, ResponseOutputItemDoneEvent
from openai.types.responses import ResponseIncompleteEvent as OpenAIResponseIncompleteEvent
from vllm.entrypoints.openai.responses.protocol import (
    ResponseCompletedEvent,
    ResponsesResponse,
    StreamingResponsesResponse,
)


class ResponseIncompleteEvent(OpenAIResponseIncompleteEvent):
    response: ResponsesResponse  # type: ignore[override]


def mark_cut_off(response: ResponsesResponse) -> None:
    """Say of the last item of an incomplete response whether it is incomplete, too."""
    if response.status != "incomplete" or not response.output:
        return
    item = response.output[-1]
    is_whole = isinstance(item, ResponseFunctionToolCall) and _is_json(item.arguments)
    if not is_whole and "status" in type(item).model_fields:
        item.status = "incomplete"


async def as_documented(events: AsyncIterator[StreamingResponsesResponse]) -> AsyncIterator[StreamingResponsesResponse]:
    """The events of a response. The end of an item waits for the event behind it, which vLLM sends at the same time."""
    done: ResponseOutputItemDoneEvent | None = None
    async for event in events:
        if isinstance(event, ResponseCompletedEvent) and event.response.status == "incomplete":
            response, number = event.response, event.sequence_number
            mark_cut_off(response)
            if done and response.output:
                done.item = response.output[-1]
            event = ResponseIncompleteEvent(type="response.incomplete", sequence_number=number, response=response)
        if done:
            yield done
        done = event if isinstance(event, ResponseOutputItemDoneEvent) else None
        if not done:
            yield event
    if done:
        yield done


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
