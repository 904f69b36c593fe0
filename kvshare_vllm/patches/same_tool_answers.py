"""An answer with tool calls is the same whether it is streamed or not, wherever it ends and however its tokens arrive.

vLLM reads a whole answer and a stream with different code. Here kvshare_vllm/tool_text.py reads both for the parsers `hermes`,
`longcat`, `llama3_json` and `llama4_json`, and for those with an engine of vLLM's (`qwen3_coder`, `glm45` and others) the code
for streams reads both. And for all parsers:
- A call that max_tokens cuts off is a call with a part of its arguments; a whole answer of vLLM's shows it as text.
- The finish reason is `length` wherever an answer was cut off, and `tool_calls` only if there is a call. The tool that a
  request names is called with finish reason `stop`, as OpenAI has it.
- Over Anthropic's Messages, where a call's input is an object, a call that was cut off has what of it is whole.

Seam: vllm/parser/abstract_parser.py (DelegatingParser.parse, _extract_tool_calls, finalize_generation),
vllm/tool_parsers/{hermes,longcat,llama}_tool_parser.py, vllm/entrypoints/openai/chat_completion/serving.py
(chat_completion_full_generator), vllm/entrypoints/anthropic/serving.py (messages_full_converter)

Goes when: vLLM reads whole answers with the code that reads its streams, and its parsers do not depend on a stream's pieces.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial

import partial_json_parser
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionNamedToolChoiceParam
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.parser.abstract_parser import DelegatingParser
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
from vllm.tool_parsers.llama_tool_parser import Llama3JsonToolParser
from vllm.tool_parsers.streaming import extract_required_tool_call_streaming

from prefillshare.kvshare_vllm import tool_text

#: Parser -> what reads the text of an answer, given the parser (subclasses have tags of their own).
_READ = {
    Hermes2ProToolParser: lambda parser: partial(
        tool_text.hermes, opening=parser.tool_call_start_token, closing=parser.tool_call_end_token
    ),
    Llama3JsonToolParser: lambda parser: partial(tool_text.llama, token=parser.bot_token),
}


def install() -> None:
    """Called once per process, before vLLM's app is built; idempotent."""
    if hasattr(DelegatingParser, "as_vllm"):
        return
    DelegatingParser.as_vllm = DelegatingParser._extract_tool_calls, DelegatingParser.finalize_generation
    for parser, reader in _READ.items():
        parser.tool_text = property(reader)
        parser.extract_tool_calls, parser.extract_tool_calls_streaming = _whole, _next
    DelegatingParser.parse = _as_a_stream(DelegatingParser.parse)
    DelegatingParser._extract_tool_calls = _required(DelegatingParser._extract_tool_calls)
    DelegatingParser.finalize_generation = _with_the_rest(DelegatingParser.finalize_generation)
    OpenAIServingChat.chat_completion_full_generator = _with_finish_reasons(OpenAIServingChat.chat_completion_full_generator)
    AnthropicServingMessages.messages_full_converter = _with_whole_inputs(AnthropicServingMessages.messages_full_converter)


def _whole(self, model_output: str, request) -> ExtractedToolCallInformation:
    content, calls = self.tool_text(model_output, True)
    found = [ToolCall(function=FunctionCall(name=call.name, arguments=call.arguments)) for call in calls]
    return ExtractedToolCallInformation(tools_called=bool(found), tool_calls=found, content=content or None)


def _next(self, previous_text: str, current_text: str, *rest) -> DeltaMessage | None:
    return _news(self, current_text, ended=False)


def _news(parser, text: str, ended: bool) -> DeltaMessage | None:
    """What the text tells beyond what the parser has told already."""
    content, calls = parser.tool_text(text, ended)
    told_content, told_calls = getattr(parser, "told", ("", []))
    parser.told = content, calls
    deltas = []
    for index, call in enumerate(calls):
        if index >= len(told_calls):
            function = DeltaFunctionCall(name=call.name, arguments=call.arguments)
            deltas.append(DeltaToolCall(index=index, type="function", id=make_tool_call_id(), function=function))
        elif more := call.arguments[len(told_calls[index].arguments) :]:
            deltas.append(DeltaToolCall(index=index, function=DeltaFunctionCall(arguments=more)))
    more = content[len(told_content) :]
    return DeltaMessage(content=more or None, tool_calls=deltas) if more or deltas else None


def _as_a_stream(parse):
    def parsed(self, model_output, request, enable_auto_tools=False, model_output_token_ids=()):
        """An answer as a stream of one piece, where the parser takes pieces of any size."""
        if not (self._engine_based and enable_auto_tools) or self._tool_parser is None or self._reasoning_parser is not None:
            return parse(self, model_output, request, enable_auto_tools, model_output_token_ids)
        delta = self.parse_delta(model_output, list(model_output_token_ids), request, prompt_token_ids=[], finished=True)
        if delta is None:
            return None, None, []
        calls: dict[int, FunctionCall] = {}
        for piece in delta.tool_calls:
            call = calls.setdefault(piece.index, FunctionCall(id=piece.id, name="", arguments=""))
            call.name += piece.function.name or ""
            call.arguments += piece.function.arguments or ""
        return None, delta.content or None, list(calls.values())

    return parsed


def _with_the_rest(finalize):
    def finalized(self, delta_message, request, state):
        """`state.previous_text` is all of the text in which calls are looked for."""
        delta_message = finalize(self, delta_message, request, state)
        if not hasattr(self._tool_parser, "tool_text") or request.tool_choice == "none" or not state.tool_call_text_started:
            return delta_message
        rest = _news(self._tool_parser, state.previous_text, ended=True)
        if delta_message is None or rest is None:
            return delta_message or rest
        delta_message.content = (delta_message.content or "") + (rest.content or "") or None
        delta_message.tool_calls = [*(delta_message.tool_calls or ()), *rest.tool_calls]
        return delta_message

    return finalized


def _required(extract):
    def extracted(self, content, request, enable_auto_tools=False):
        """Parsers without a format of their own for forced calls get them as one JSON array, which may have been cut off."""
        parser = self._tool_parser
        if parser is None or not parser.supports_required_and_named or request.tool_choice != "required":
            return extract(self, content, request, enable_auto_tools)
        read = extract_required_tool_call_streaming
        delta, _ = read(previous_text="", current_text=content, tool_call_idx=None, tool_call_id_type="random")
        found = [call.function for call in delta.tool_calls] if delta else []
        return [FunctionCall(id=self._make_tool_call_id(f.name), name=f.name, arguments=f.arguments) for f in found], None

    return extracted


def _with_finish_reasons(whole_answer):
    async def answered(self, request, result_generator: AsyncIterator, *rest, **more):
        reasons: dict[int, str | None] = {}

        async def noted():
            async for result in result_generator:
                reasons.update((output.index, output.finish_reason) for output in result.outputs)
                yield result

        response = await whole_answer(self, request, noted(), *rest, **more)
        is_named = isinstance(request.tool_choice, ChatCompletionNamedToolChoiceParam)
        for choice in getattr(response, "choices", ()):
            called, reason = bool(choice.message.tool_calls), reasons.get(choice.index) or "stop"
            choice.finish_reason = "tool_calls" if called and not is_named and reason == "stop" else reason
            if called:
                choice.message.content = choice.message.content or None
        return response

    return answered


def _with_whole_inputs(convert):
    def converted(self, generator):
        choice = generator.choices[0]
        cut_off = False
        for call in choice.message.tool_calls:
            try:
                is_object = isinstance(json.loads(call.function.arguments), dict)
            except ValueError:
                is_object, cut_off = False, True
            if not is_object:
                call.function.arguments = json.dumps(_as_far_as_it_goes(call.function.arguments), ensure_ascii=False)
        message = convert(self, generator)
        if cut_off and message.stop_reason == "tool_use" and isinstance(choice.stop_reason, str):
            message.stop_reason, message.stop_sequence = "stop_sequence", choice.stop_reason
        return message

    return converted


def _as_far_as_it_goes(text: str) -> dict:
    try:
        read = partial_json_parser.loads(text)
    except Exception:  # it is no JSON from its beginning on
        return {}
    return read if isinstance(read, dict) else {}
