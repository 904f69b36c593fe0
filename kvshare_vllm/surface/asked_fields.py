"""What HTTP requests ask for, checked on plain JSON before vLLM's request classes see it.

- Fields that nobody reads are named in a header of the response (IGNORED_HEADER). vLLM takes them silently, and they cannot be
  refused: clients send fields of OpenAI's newest API all the time.
- Those among them whose silence misleads are refused: they ask for a format or for tools, and have another name now; or the
  client would send less the next time, because it takes the conversation to be held.
- A message has a role that chat templates know, and consists of text. A tool's result names a call before it.

Seam: the bodies that vLLM's routes take (vllm/entrypoints/{openai,anthropic,serve}: protocol.py),
vllm/renderers/chat_utils.py (MM_PARSER_MAP: the types of a message's parts)
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, get_args
from urllib.parse import quote

from pydantic import BaseModel
from vllm.renderers.chat_utils import MM_PARSER_MAP

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.forced_calls import check_format_beside_forced_call
from prefillshare.kvshare_vllm.surface.http_errors import THREAD
from prefillshare.kvshare_vllm.surface.roles import ROLES, check_role
from prefillshare.kvshare_vllm.surface.tool_results import Reader, check_results, of_anthropic, of_openai

IGNORED_HEADER = "x-prefillshare-ignored"
#: Most names in the header, and most characters of each.
MOST_NAMES, MOST_CHARS = 20, 64

#: Fields that we read ourselves, and what they may be.
_OURS: dict[str, dict[str, type | UnionType]] = {
    "/v1/responses": {"conversation": str | dict, "prompt_cache_retention": str},
    "/v1/chat/completions": {"prompt_cache_retention": str},
    "/v1/messages": {"cache_control": dict},
}
#: Names in `chat_template_kwargs` that the renderer sets itself.
_SET_HERE = frozenset({
    "self", "model_config", "tokenizer", "messages", "conversation", "tools", "chat_template", "tokenize", "padding",
    "truncation", "add_generation_prompt", "continue_final_message", "max_length", "return_tensors", "return_dict",
    "tokenizer_kwargs", "return_assistant_tokens_mask",
})  # fmt: skip
#: Field -> what to send instead.
_RENAMED = {
    "guided_json": 'send response_format, or structured_outputs: {"json": ...}',
    "guided_regex": 'send structured_outputs: {"regex": ...}',
    "guided_choice": 'send structured_outputs: {"choice": [...]}',
    "guided_grammar": 'send structured_outputs: {"grammar": ...}',
    "guided_whitespace_pattern": "leave it out",
    "guided_decoding_backend": "leave it out: engines have one",
    "functions": "send tools",
    "function_call": "send tool_choice",
    "extra_body": "send the fields that it holds in the body itself",
}
#: Path -> field that asks for what there is not here, and whose silence would mislead -> what to do instead.
_NOT_HERE = {
    "/v1/messages": {
        THREAD: "send the whole history with each request; a session (x-prefillshare-session) holds what has been computed"
    },
}
#: Types of the parts of an item -> the field that has the text.
_TEXTS = {
    "input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal",
    "reasoning_text": "text", "summary_text": "text",
}  # fmt: skip
#: Types of the tools that clients run, of the Responses API.
_CLIENTS_TOOLS = ("function", "custom", "namespace")
#: Roles of Anthropic's API.
_ANTHROPIC = ("user", "assistant", "system")
#: Path -> how its messages tell tool results, where they are a whole history that is answered.
_RESULTS = {
    "/v1/chat/completions": of_openai,
    "/v1/chat/completions/batch": of_openai,
    "/v1/messages": of_anthropic,
    "/v1/messages/count_tokens": of_anthropic,
}


class AskedFields:
    """`routes`: those of vLLM's app."""

    def __init__(self, routes: Iterable[Any]):
        served = [route for route in routes if _models_of(route)]
        self._known = {route.path: _fields_of(route) | _OURS.get(route.path, {}).keys() for route in served}

    def ignored(self, path: str, body: Mapping[str, Any]) -> list[str]:
        """The fields of a body that nobody reads. Raises InvalidInput for what is refused."""
        if (known := self._known.get(path)) is None:
            return []
        unknown = [name for name, value in body.items() if value is not None and name not in known]
        for name in unknown:
            if fix := _RENAMED.get(name) or _NOT_HERE.get(path, {}).get(name):
                raise InvalidInput("it would have no effect", field=name, fix=fix)
        _check_kinds(path, body)
        roles = _ANTHROPIC if path.startswith("/v1/messages") else ROLES
        _check_messages(body.get("messages"), "messages", roles, _RESULTS.get(path))
        check_format_beside_forced_call(body)
        if path == "/v1/responses":
            check_items(body.get("input"), "input")
            unknown += _not_run(body.get("tools") or ())
        return unknown


def header_of(names: Sequence[str]) -> tuple[bytes, bytes]:
    shown = [quote(name, safe="!#$&'()*+/:;<=>?@[]^`{|}~ ")[:MOST_CHARS] for name in names[:MOST_NAMES]]
    return IGNORED_HEADER.encode(), ", ".join([*shown, *(["..."] if len(names) > MOST_NAMES else [])]).encode("latin-1")


def _check_kinds(path: str, body: Mapping[str, Any]) -> None:
    """Of the fields that are read here, or by parts of vLLM that do not look at what they are."""
    needs_messages = "messages" in body and body.get("prompt") is None
    for name, kind in (("messages", list if needs_messages else list | None), ("tools", list | None)):
        if not isinstance(body.get(name), kind):
            raise InvalidInput("this is no list", field=name, fix="give a list of objects")
    for name, kind in ({"structured_outputs": dict} | _OURS.get(path, {})).items():
        if not isinstance(body.get(name), kind | None):
            text = "a text" if kind is str else "an object" if kind is dict else "a text or an object"
            raise InvalidInput(f"this is not {text}", field=name, fix=f"send {text}, or leave it out")
    settings = body.get("chat_template_kwargs")
    for name in settings if isinstance(settings, dict) else ():
        if name in _SET_HERE:
            raise InvalidInput("it is set by the server", field=f"chat_template_kwargs.{name}", fix="leave it out")


def _models_of(route: Any) -> list[type[BaseModel]]:
    """The classes of which a route's body may be."""
    given = getattr(getattr(route, "body_field", None), "field_info", None)
    kinds = get_args(given.annotation) or (given.annotation,) if given else ()
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _fields_of(route: Any) -> set[str]:
    fields = [item for model in _models_of(route) for item in model.model_fields.items()]
    return {name for name, _ in fields} | {field.alias for _, field in fields if field.alias}


def _check_messages(messages: Any, field: str, roles: Sequence[str], results: Reader | None) -> None:
    """What is not a list of objects is left to vLLM."""
    messages = messages if isinstance(messages, list) else ()
    for number, message in enumerate(messages):
        place = f"{field}.{number}"
        if isinstance(message, list):  # a conversation of several
            _check_messages(message, place, roles, results)
        elif isinstance(message, dict):
            check_role(message.get("role"), place, roles)
            if roles is ROLES:
                _check_chat_message(message, place)
    if results:
        check_results(messages, field, results)


def _check_chat_message(message: Mapping[str, Any], field: str) -> None:
    """What vLLM looks at only when it lays the message out."""
    if not isinstance(message.get("tool_calls"), list | None):
        raise InvalidInput("this is no list", field=f"{field}.tool_calls", fix="give a list of calls, or leave it out")
    content = message.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, str):
            _check_part(part, f"{field}.content.{number}", _TEXTS | MM_PARSER_MAP)


def check_items(items: Any, field: str) -> None:
    """Of the Responses API, where only some items are messages. Raises InvalidInput; leaves the rest to vLLM, as above."""
    for number, item in enumerate(items if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            continue
        place = f"{field}.{number}"
        if item.get("type") in (None, "message"):
            check_role(item.get("role"), place)
        for name in ("content", "output"):
            if isinstance(parts := item.get(name), list):
                _check_parts(parts, f"{place}.{name}")


def _check_parts(parts: Sequence[Any], field: str) -> None:
    for number, part in enumerate(parts):
        _check_part(part, f"{field}.{number}", _TEXTS)


def _check_part(part: Any, field: str, kinds: Container[str]) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        what = "a part without a type" if kind is None else f"a part of type {str(kind)[:64]!r}: only text is served"
        raise InvalidInput(what, field=field, fix=f"send parts of the types {', '.join(_TEXTS)}")
    if kind in _TEXTS and not isinstance(part.get(_TEXTS[kind]), str):
        raise InvalidInput("this is no text", field=f"{field}.{_TEXTS[kind]}", fix="send a string")


def _not_run(tools: Sequence[Any]) -> list[str]:
    """Tools that would run on the server, which has none."""
    kinds = [tool.get("type") if isinstance(tool, dict) else None for tool in tools]
    return [f"tools.{n} ({kind})" for n, kind in enumerate(kinds) if isinstance(kind, str) and kind not in _CLIENTS_TOOLS]
