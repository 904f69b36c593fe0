"""Tool calls in the text of an answer, as far as it has been generated.

Each reader takes the text so far and returns (text that is no call, calls). Whatever it has returned for a beginning of the
text stays: with more text, the content and the arguments only grow, and calls are added. So the pieces of a stream, which are
the differences from one text to the next, together are what the whole text gives. Arguments are returned as they were written.

`ended`: no more text will come. Until then, text that may turn out to be a part of a call is held back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

#: What cannot change the nesting, at once: a text is looked through again with each of its pieces.
_RUN = re.compile(r'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)
#: First keys of an object that may be a call; others' text is not held back.
_FIRST_KEYS = ("name", "type", "parameters", "arguments")


@dataclass(frozen=True)
class Call:
    name: str
    #: JSON, unless the text ends within it or the model has written something else.
    arguments: str


Read = Callable[[str, bool], tuple[str, list[Call]]]


@dataclass
class _Object:
    """The JSON object that begins at `start`, as far as it goes. `end`: behind its closing brace; None: the text ends first."""

    start: int
    #: None: it has not ended yet; "": the first thing in the object is no key.
    first_key: str | None = None
    name: str | None = None
    arguments: tuple[int, int] | None = None
    end: int | None = None
    #: The text ends within a string.
    in_string: bool = False


def hermes(text: str, ended: bool, opening: str = "<tool_call>", closing: str = "</tool_call>") -> tuple[str, list[Call]]:
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`. What stands behind the first call and is none is left out."""
    calls: list[Call] = []
    first, held, at, closed = None, None, 0, True
    while closed and (start := text.find(opening, at)) >= 0:
        found, closed, at = _within(text, start + len(opening), closing)
        if found.name:
            first = start if first is None else first
            calls.append(Call(found.name, _arguments(text, found, closed or found.end is not None, (closing, opening), ended)))
        elif not closed:
            held = start
    return _content(text, first, held, (opening,), ended), calls


def _within(text: str, begin: int, closing: str) -> tuple[_Object, bool, int]:
    """(the object of the call whose text begins there, whether the call is closed, where the text behind it begins)."""
    brace, look = len(text) - len(text[begin:].lstrip()), begin
    while (close := text.find(closing, look)) >= 0:
        found = _object(text[:close], brace, ("arguments",))
        if not found.in_string:  # whether or not the object was closed
            return found, True, close + len(closing)
        look = close + len(closing)
    return _object(text, brace, ("arguments",)), False, len(text)


def llama(text: str, ended: bool, token: str = "<|python_tag|>") -> tuple[str, list[Call]]:
    """`{"name": ..., "parameters": ...}` (or "arguments") at the beginning of a line, behind `token`, or behind another call
    and a `;`. What stands behind the first call and is none is left out."""
    calls: list[Call] = []
    first, held, behind, at = None, None, None, 0
    while held is None and (start := text.find("{", at)) >= 0:
        at, before = start + 1, _without(text[:start], token)
        behind_call = behind is not None and not text[behind:start].strip("; \t\r\n")
        if not (behind_call or before != start or not text[:start].strip() or text[start - 1] == "\n"):
            continue
        found = _object(text, start, ("parameters", "arguments"))
        if found.name and found.arguments and found.first_key in _FIRST_KEYS:
            first = before if first is None else first
            calls.append(Call(found.name, _arguments(text, found, found.end is not None, (), ended)))
            at = behind = len(text) if found.end is None else found.end
        elif found.end is None and (found.first_key is None or found.first_key in _FIRST_KEYS):
            held = before
    if held is None and (before := _without(text, token)) != len(text):
        held = before
    return _content(text, first, held, (token,), ended), calls


def _without(text: str, token: str) -> int:
    """Where the text ends if a token at its end, and the white space behind that, do not count."""
    seen = text.rstrip()
    return len(seen) - len(token) if seen.endswith(token) else len(text)


def _object(text: str, start: int, argument_keys: tuple[str, ...]) -> _Object:
    found, depth, key, of_value, end = _Object(start), 0, None, None, start
    if not text.startswith("{", start):
        return found
    while match := _TOKEN.search(text, _RUN.match(text, end).end() if depth > 1 else end):
        token, end = match.group(), match.end()
        is_string = token[0] == '"'
        is_open = is_string and not _is_closed(token)
        if token in "{[":
            depth += 1
        elif token in "}]":
            depth -= 1
        if depth <= 0:
            found.end = end
            return found
        if found.first_key is None and match.start() > start and not is_string:
            found.first_key = ""
        if depth == 1 and token == ":" and of_value is None:
            of_value = key
        elif depth == 1 and token == ",":
            key = of_value = None
        elif of_value is None:
            if depth == 1 and is_string and not is_open and key is None:
                key = _string(token)
                found.first_key = found.first_key if found.first_key is not None else key
        elif of_value in argument_keys:
            if found.arguments is None:
                found.arguments = (match.start(), end)
            elif depth > 1 or token in "}]":
                found.arguments = (found.arguments[0], end)
        elif of_value == "name" and depth == 1 and is_string and not is_open and found.name is None:
            found.name = _string(token)
        found.in_string = is_open
    if found.arguments and depth > 1 and of_value in argument_keys:
        found.arguments = (found.arguments[0], len(text))
    return found


def _is_closed(string: str) -> bool:
    return len(string) > 1 and string[-1] == '"' and (len(string) - len(string[:-1].rstrip("\\")) - 1) % 2 == 0


def _string(token: str) -> str | None:
    try:
        return json.loads(token, strict=False)
    except ValueError:
        return None


def _arguments(text: str, found: _Object, is_whole: bool, tags: tuple[str, ...], ended: bool) -> str:
    if found.arguments is None:
        return "{}" if is_whole else ""
    begin, end = found.arguments
    written = text[begin:end]
    if end == len(text) and not ended:
        written = written[: len(written) - max((_overlap(written, tag) for tag in tags), default=0)]
    return written


def _content(text: str, first: int | None, held: int | None, tags: tuple[str, ...], ended: bool) -> str:
    """What stands before the first call, if it is more than white space; all text if there is no call."""
    if first is not None:
        content = text[:first]
    elif ended:
        return text
    elif held is not None:
        content = text[:held]
    else:
        content = text[: len(text) - max(_overlap(text, tag) for tag in tags)]
    return "" if content.isspace() else content


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the beginning of the tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
