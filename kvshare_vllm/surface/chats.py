"""What vLLM's chat service knows of this deployment's chats, for turns on sessions: how the template lays out messages, and how
the base's family writes tool calls. Tool calls are constrained and found by the parser classes that serve HTTP.

Seam: vllm/entrypoints/openai/chat_completion/serving.py (`parser_cls`, chat_completion_stream_generator),
vllm/renderers/online_renderer.py (`parser`, preprocess_chat),
vllm/parser/abstract_parser.py (Parser.adjust_request, parse_delta)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.utils.tool_calls_utils import maybe_filter_parallel_tool_calls
from vllm.outputs import CompletionOutput
from vllm.parser.abstract_parser import Parser
from vllm.renderers.chat_utils import ChatTemplateResolutionError, make_tool_call_id
from vllm.renderers.hf import safe_apply_chat_template
from vllm.utils.collection_utils import as_list

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.chat_request import chat_request, sampling_of
from prefillshare.kvshare_vllm.vllm_refusals import as_our_errors

Messages = Sequence[Mapping[str, Any]]


class Chats:
    """`service`: vLLM's, of an app that serves chat completions."""

    def __init__(self, service: Any):
        self._service = service

    def render(self, messages: Messages, answer: bool, tools: Messages | None = None) -> str:
        """Chat messages as the template lays them out. `answer`: with the opening of an answer. Raises InvalidInput."""
        service = self._service
        settings = {"chat_template": service.chat_template, **service.default_chat_template_kwargs}
        how = {"tools": tools, "tokenize": False, "add_generation_prompt": answer, "continue_final_message": False}
        tokenizer = service.renderer.tokenizer
        try:
            with as_our_errors():
                return safe_apply_chat_template(service.model_config, tokenizer, list(messages), **settings | how)
        except ChatTemplateResolutionError:
            raise InvalidInput(
                "the base has no chat template", field="input.messages", fix="append text or token ids instead"
            ) from None
        except InvalidInput as error:
            text = f"the base's chat template refuses these messages: {error.message}"
            raise InvalidInput(text, field="input.messages") from None

    def asked_tools(self, fields: Mapping[str, Any], max_tokens: int | None) -> AskedTools:
        """`fields`: of a chat completion, with tools. Raises InvalidInput."""
        service, request = self._service, chat_request(fields)
        parser_cls = service.online_renderer.parser  # what HTTP requests are adjusted by; base.tool_strict_level is set on it
        if request.tool_choice != "none" and (parser_cls is None or parser_cls.tool_parser_cls is None):
            raise InvalidInput(
                "tools need base.tool_call_parser, which this deployment does not set",
                field="tools",
                fix="leave them out, or have it set",
            )
        asked = AskedTools(service, request)
        if request.tool_choice != "none":
            with as_our_errors():
                asked.request = asked.parser(parser_cls).adjust_request(request)
        asked.sampling = sampling_of(asked.request, max_tokens)
        return asked


@dataclass
class AskedTools:
    """The tools of one turn, as its client has asked for them."""

    service: Any
    request: ChatCompletionRequest
    sampling: SamplingParams = field(init=False)

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """As templates get them."""
        return [tool.model_dump() for tool in self.request.tools]

    def parser(self, kind: type[Parser]) -> Parser:
        """A new one, which keeps the state of one response."""
        service, request = self.service, self.request
        return kind(
            service.renderer.tokenizer,
            request.tools,
            chat_template_kwargs=service._effective_chat_template_kwargs(request),
            model_config=service.model_config,
        )

    def answer(self) -> Answer:
        """For one response."""
        kind = self.service.parser_cls
        return Answer(self.parser(kind) if kind else None, self.request)


@dataclass
class ToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclass(frozen=True)
class ToolCallDelta:
    """What is new of the call with this number. `id`, `name`: of its first piece only."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Answer:
    """One response while it streams: text and tool calls apart. Without a parser, all of it is text."""

    def __init__(self, parser: Parser | None = None, request: ChatCompletionRequest | None = None):
        self._parser, self._request = parser, request
        self.text, self.calls = "", dict[int, ToolCall]()

    def read(self, output: CompletionOutput, prompt_token_ids: list[int]) -> tuple[str, list[ToolCallDelta]]:
        """What the next piece of the response adds: (text, pieces of calls)."""
        if self._parser is None:
            self.text += output.text
            return output.text, []
        delta = self._parser.parse_delta(
            output.text,
            as_list(output.token_ids),
            self._request,
            prompt_token_ids,
            finished=output.finish_reason is not None,
        )
        if delta is None:
            return "", []
        delta = maybe_filter_parallel_tool_calls(delta, self._request)
        self.text += delta.content or ""
        return delta.content or "", [self._noted(call) for call in delta.tool_calls]

    def finish_reason(self, reason: str) -> str:
        return "tool_calls" if self.calls and reason == "stop" else reason

    @property
    def message(self) -> dict[str, Any]:
        """The response as the message that a client would send back."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls.values()
            ]
        return message

    def _noted(self, piece: Any) -> ToolCallDelta:
        name, arguments = piece.function.name or "", piece.function.arguments or ""
        if call := self.calls.get(piece.index):
            call.arguments += arguments
            return ToolCallDelta(piece.index, arguments=arguments)
        call = self.calls[piece.index] = ToolCall(piece.id or make_tool_call_id(), name, arguments)
        return ToolCallDelta(piece.index, call.id, name, arguments)
