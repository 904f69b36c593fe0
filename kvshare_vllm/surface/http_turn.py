"""What ties an HTTP request of vLLM's server to a context: how its prompt is laid out, and what becomes of its response.

The router binds an HttpTurn to a request before vLLM's server sees it. vLLM parses the request, and asks the bound turn for the
prompt instead of applying the chat template (renderer_work.py); then it asks the frontend to generate, which leaves that to the
bound turn, too. Requests to which nothing is bound are served as vLLM serves them.

Seam: vllm/entrypoints/openai/{chat_completion,responses}/serving.py: `parser_cls`, `parser`, Parser.parse
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreRequest

from prefillshare.kvshare.caller import Caller

#: (messages, whether the answer is opened behind them, tools) -> text.
Render = Callable[[Sequence[Mapping[str, Any]], bool, Sequence[Mapping[str, Any]] | None], str]


@dataclass(frozen=True)
class Conversation:
    """What a request says, as chat messages. `continues`: no answer is opened, as the last message is to be continued.
    `chars`: of all of it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    continues: bool
    render: Render
    chars: int


class HttpTurn(Protocol):
    async def lay_out(
        self, conversation: Conversation, plain: Callable[[], Awaitable[str | list[int]]]
    ) -> str | list[int]:
        """The request's prompt, as text or token ids. `plain` lays the conversation out as the template does.
        Raises PrefillShareError."""

    def outputs(
        self, request: EngineCoreRequest, decoder: str, caller: Caller, prompt_text: str | None
    ) -> AsyncIterator[RequestOutput]:
        """The outputs of a prepared request, as of Run.outputs."""


@dataclass
class _Bound:
    """`service`, `asked`: vLLM's service that serves the request, and the request as it has parsed it."""

    turn: HttpTurn
    service: Any = None
    asked: Any = None


_bound: ContextVar[_Bound | None] = ContextVar("prefillshare_http_turn", default=None)


def bind(turn: HttpTurn):
    """Bind a turn to the request being served. Returns what `unbind` takes."""
    return _bound.set(_Bound(turn))


def unbind(token) -> None:
    _bound.reset(token)


@contextmanager
def unbound() -> Iterator[None]:
    """Within this context, no turn is bound to the request being served."""
    token = _bound.set(None)
    try:
        yield
    finally:
        _bound.reset(token)


def bound_turn() -> HttpTurn | None:
    return bound.turn if (bound := _bound.get()) else None


def note_asked(service: Any, asked: Any) -> None:
    """A service has begun to serve this request."""
    if bound := _bound.get():
        bound.service, bound.asked = service, asked


def asked() -> Any:
    """The request to which a turn is bound, as vLLM's server has parsed it."""
    return bound.asked if (bound := _bound.get()) else None


def message_of(text: str, token_ids: Sequence[int]) -> dict[str, Any]:
    """A response to the request being served as the message that its client will send back with the next call: text and tool
    calls apart, as vLLM's server tells them apart."""
    bound, message = _bound.get(), {"role": "assistant", "content": text}
    service, request = (bound.service, bound.asked) if bound else (None, None)
    parser_cls = getattr(service, "parser_cls", None) or getattr(service, "parser", None)
    if parser_cls is None:
        return message
    template_kwargs = service._effective_chat_template_kwargs(request)
    parser = parser_cls(
        service.renderer.tokenizer, request.tools, chat_template_kwargs=template_kwargs, model_config=service.model_config
    )
    _, content, calls = parser.parse(
        text, request, enable_auto_tools=service.enable_auto_tools, model_output_token_ids=list(token_ids)
    )
    message["content"] = content or ""
    if calls:
        message["tool_calls"] = [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    return message
