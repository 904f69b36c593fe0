"""Checks engines' arguments with vLLM's own code, which creates their configurations but no engine.

`python -m prefillshare.kvshare_vllm.engine.argument_check` reads {"engines": {name: EngineSettings}, "base": {"model": folder,
"tool_call_parser": name or null, "chat_template": text or null}} from its standard input and writes {"problems": [{"engine",
"argument", "message", "fix"}], "warnings": [text], "unchecked": why not, or ""} to its output.
`argument` is a field of EngineSettings, `engine_args.NAME`, or empty if no single one is at fault; `engine` is empty for a
problem of the base's. It runs in its own process: vLLM takes seconds to import and writes to the environment.

Seam: vllm/engine/arg_utils.py (`create_engine_config`); vllm/tool_parsers/abstract_tool_parser.py
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from prefillshare.kvshare import chat_template
from prefillshare.kvshare.engine_settings import EngineSettings
from prefillshare.kvshare.replica_info import KVEvents
from prefillshare.kvshare_vllm.engine.launch import Ports, engine_args, set_environment

_NOWHERE = KVEvents("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
_KNOWN = [field.name for field in dataclasses.fields(AsyncEngineArgs)]


def problems(engines: Mapping[str, EngineSettings]) -> Iterator[dict[str, str]]:
    for name, settings in engines.items():
        unknown = [key for key in settings.engine_args if key not in _KNOWN]
        for key in unknown:
            close = difflib.get_close_matches(key, _KNOWN, n=1)
            message = "vLLM knows no such engine argument" + (f"; did you mean {close[0]}?" if close else "")
            yield {"engine": name, "argument": f"engine_args.{key}", "message": message}
        known = dataclasses.replace(settings, engine_args=_without(settings.engine_args, *unknown))
        if message := refusal(known):
            yield {"engine": name, "argument": _at_fault(known), "message": message}


def problems_of_base(base: Mapping[str, str | None]) -> Iterator[dict[str, str]]:
    if name := base["tool_call_parser"]:
        from vllm.tool_parsers import ToolParserManager  # takes seconds

        if name not in (names := ToolParserManager.list_registered()):
            message = f"vLLM has no tool parser {name!r}; it has {', '.join(names)}"
            yield {"engine": "", "argument": "tool_call_parser", "message": message}
    if base["chat_template"] and (message := chat_template.problem(_tokenizer(base))):
        fix = "correct it, or leave it out for the base's own"
        yield {"engine": "", "argument": "chat_template", "message": message, "fix": fix}


def warnings_of_base(base: Mapping[str, str | None]) -> Iterator[str]:
    """What engines would start with, but nobody can want."""
    if base["tool_call_parser"] and (message := chat_template.tools_problem(_tokenizer(base))):
        yield f"base.tool_call_parser is {base['tool_call_parser']}, but {message} (fix: set base.chat_template)"


def _tokenizer(base: Mapping[str, str | None]):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base["model"])
    tokenizer.chat_template = base["chat_template"] or tokenizer.chat_template
    return tokenizer


def refusal(settings: EngineSettings) -> str:
    """vLLM's objection to these settings; empty if it has none."""
    environment = dict(os.environ)
    try:
        set_environment(settings, "127.0.0.1", Ports(1, 2, 3))
        config = AsyncEngineArgs(**engine_args(settings, _NOWHERE)).create_engine_config()
    except ValidationError as error:
        return "; ".join(re.sub(r"^(Value error|Assertion failed), ", "", item["msg"]) for item in error.errors())
    except Exception as error:
        return str(error) or type(error).__name__
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return "it needs vLLM's V2 model runner, and engines run the V1 runner" if config.use_v2_model_runner else ""


def _at_fault(settings: EngineSettings) -> str:
    """The one argument without which vLLM accepts the others; empty if there is none."""
    for key in settings.engine_args:
        if not refusal(dataclasses.replace(settings, engine_args=_without(settings.engine_args, key))):
            return f"engine_args.{key}"
    for field, unset in (("max_num_batched_tokens", None), ("tensor_parallel_size", 1)):
        if getattr(settings, field) != unset and not refusal(dataclasses.replace(settings, **{field: unset})):
            return field
    return ""


def _without(arguments: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in keys}


def _here(settings: EngineSettings) -> EngineSettings:
    """The settings, with one device for an engine that wants more than this machine has: other machines may have them."""
    if current_platform.is_cpu() or settings.tensor_parallel_size <= current_platform.device_count():
        return settings
    return dataclasses.replace(settings, tensor_parallel_size=1)


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not part of the answer
    asked = json.load(sys.stdin)
    if not current_platform.device_type:
        found: dict[str, Any] = {"problems": [], "unchecked": "vLLM finds no device on this machine"}
    else:
        engines = {name: _here(EngineSettings(**settings)) for name, settings in asked["engines"].items()}
        found = {"problems": list(problems(engines)), "unchecked": ""}
    found["problems"] += problems_of_base(asked["base"])
    found["warnings"] = [] if found["problems"] else list(warnings_of_base(asked["base"]))
    with answer:
        json.dump(found, answer)


if __name__ == "__main__":
    main()
