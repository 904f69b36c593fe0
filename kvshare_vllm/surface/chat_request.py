"""What a turn over gRPC asks of sampling and of its response's format, read by the class that reads OpenAI's chat completions:
both surfaces take the same, and refuse the same.

Seam: vllm/entrypoints/openai/chat_completion/protocol.py (ChatCompletionRequest)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.forced_calls import check_format_beside_forced_call
from prefillshare.kvshare_vllm.vllm_refusals import as_our_errors, for_clients

#: For limits that are not known yet.
_UNLIMITED = 2**31 - 1


def chat_request(fields: Mapping[str, Any]) -> ChatCompletionRequest:
    """`fields`: of a chat completion, but for messages and model. Raises InvalidInput that names the field."""
    check_format_beside_forced_call(fields)
    try:
        with as_our_errors():
            return ChatCompletionRequest(messages=[], stream=True, **fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(for_clients(first["msg"]), field=place or None, fix="see vLLM's API of chat completions") from None


def sampling_of(request: ChatCompletionRequest, max_tokens: int | None) -> SamplingParams:
    """Sampling parameters for streamed deltas. Raises InvalidInput, which names the field if vLLM does."""
    with as_our_errors():
        sampling = request.to_sampling_params(max_tokens or _UNLIMITED, {})
    sampling.max_tokens = max_tokens
    return sampling
