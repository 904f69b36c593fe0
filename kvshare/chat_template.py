"""`base.chat_template`: the template that lays out conversations, in place of the one in the base's folder.

It is a Jinja file, or the name of a template that comes with us (kvshare/chat_templates/) or with vLLM. A name stays a name in
the deployment, so that it means the template of whichever machine reads it; a file becomes an absolute path.

Seam: vllm/transformers_utils/chat_templates/
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from prefillshare.kvshare.errors import ConfigError

_OURS = Path(__file__).parent / "chat_templates"
_OF_VLLM = "transformers_utils/chat_templates"
_FIX = "give a Jinja file, or one of the names {names}"
#: Tags that transformers adds to Jinja.
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_ASKED = [{"role": "user", "content": "xyzzy"}]
_TOOL = {"type": "function", "function": {"name": "plugh", "description": "None.", "parameters": {"type": "object"}}}


class Tokenizer(Protocol):
    """What a tokenizer of transformers offers."""

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **how: Any) -> str: ...


def shipped() -> dict[str, Path]:
    """Name -> file of every template that comes with us, ours first, or with vLLM where it is installed."""
    vllm = find_spec("vllm")
    folders = [_OURS, *(Path(folder, _OF_VLLM) for folder in (vllm.submodule_search_locations if vllm else None) or ())]
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.jinja")):
            found.setdefault(file.stem, file)
    return found


def found(given: str, folder: Path, field: str = "base.chat_template") -> str:
    """A shipped template's name as it is, or a file's absolute path: relative ones are tried from the current folder, then
    from `folder`. Raises ConfigError."""
    if given in (names := shipped()):
        return given
    candidates = (Path(given).expanduser(), folder / given)
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate.resolve())
    tried = " or ".join(dict.fromkeys(str(c.absolute()) for c in candidates))
    raise ConfigError(
        f"no such chat template: {given!r} (looked for {tried})", field=field, fix=_FIX.format(names=", ".join(names))
    )


def path_of(given: str) -> Path:
    """The file of what `found` has returned, on this machine."""
    return shipped().get(given) or Path(given)


def text_of(given: str | None, field: str = "base.chat_template") -> str | None:
    """The template's text; None if none is given. Raises ConfigError."""
    if given is None:
        return None
    path = path_of(given)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        fix = _FIX.format(names=", ".join(shipped()))
        raise ConfigError(f"cannot read the chat template {path}: {why}", field=field, fix=fix) from None
    if not text.strip():
        raise ConfigError(f"the chat template {path} is empty", field=field, fix="leave it out for the base's own")
    if wrong := _syntax_error(text):
        raise ConfigError(f"the chat template {path} is no Jinja: {wrong}", field=field, fix="correct it")
    return text


def _syntax_error(text: str) -> str:
    """Empty if there is none, or if there is no Jinja here, as beside the client only."""
    try:
        from jinja2 import Environment, TemplateSyntaxError
    except ModuleNotFoundError:
        return ""
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return ""


def text_of_given(given: str | None, field: str) -> str | None:
    """The text of a template that is named as in base.chat_template; relative paths are the current folder's. Raises
    ConfigError naming the field."""
    return text_of(given and found(given, Path(), field), field)


def problem(tokenizer: Tokenizer) -> str:
    """Why the tokenizer's template cannot lay out a conversation; empty if it can."""
    try:
        text = _laid_out(tokenizer)
    except Exception as error:  # jinja's errors, and whatever the template's own code raises
        return f"the chat template does not render: {error}"
    return "" if _ASKED[0]["content"] in text else "the chat template leaves the messages' content out"


def tools_problem(tokenizer: Tokenizer) -> str:
    """Why a model cannot learn of a request's tools by the tokenizer's template; empty if it can."""
    try:
        text = _laid_out(tokenizer, tools=[_TOOL])
    except Exception as error:
        return f"the chat template does not render with tools: {error}"
    return "" if _TOOL["function"]["name"] in text else "the chat template has no place for tools: no model gets to see them"


def _laid_out(tokenizer: Tokenizer, **more: Any) -> str:
    return tokenizer.apply_chat_template(_ASKED, tokenize=False, add_generation_prompt=True, **more)
