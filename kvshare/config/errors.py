"""What pydantic found wrong with a deployment file, in the words of the file: field's path, value, what is allowed."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.yaml_tree import FieldError

#: pydantic's words for kinds of value, in the words of YAML.
_SHOULD_BE = {
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "tuple_type": "should be a list",
    "too_short": "should have at least one entry",
    "string_too_short": "should not be empty",
}


def as_config_error(error: ValidationError, root: type[BaseModel], *, secret: bool = False) -> ConfigError:
    """One ConfigError for all that pydantic found wrong with a tree of type `root`; its `field` is the first bad field.

    `secret`: no value is shown, nor a key that the tree does not know: either may be a secret in the wrong place.
    """
    problems = []
    items = error.errors()
    for item in items:
        if item["type"] == "too_short" and any(i["loc"][: len(item["loc"])] == item["loc"] for i in items if i is not item):
            continue  # pydantic counts only the entries that are right
        loc, is_key = item["loc"], item["loc"][-1:] == ("[key]",)
        if item["type"] == "extra_forbidden":
            message = f"unknown key{_did_you_mean(loc, root.model_json_schema())}"
        elif item["type"] == "missing":
            message = "required, but not given"
        elif item["type"] == "value_error":
            wrong = item["ctx"]["error"]
            message = str(wrong)
            if isinstance(wrong, FieldError):
                loc = (*loc, wrong.field)
        else:
            got = _kind(item["input"]) if secret else shown(item["input"])
            message = f"{_SHOULD_BE.get(item['type'], item['msg'])}, got {got}"
        if secret and (is_key or item["type"] == "extra_forbidden"):
            loc = loc[: -2 if is_key else -1]
        problems.append((".".join(_named(part) for part in loc if part != "[key]"), message))
    field, message = problems[0]
    rest = "".join(f"\n  {f}: {m}" if f else f"\n  {m}" for f, m in problems[1:])
    return ConfigError(message + rest, field=field or None)


def _named(part: object) -> str:
    """A part of a path, in quotes where it would not be seen."""
    return text if (text := str(part)).strip() else repr(text)


def shown(value: Any) -> str:
    """A value as an error message shows it."""
    return _kind(value) if value is None or (isinstance(value, dict | list) and value) else repr(value)


def _kind(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else kinds.get(type(value), "something else")


def _did_you_mean(loc: tuple, schema: dict[str, Any]) -> str:
    node = schema
    for part in loc[:-1]:
        node = _below(node, part)
        for choice in (node, *node.get("anyOf", ())):
            if "$ref" in choice:
                node = schema["$defs"][choice["$ref"].rsplit("/", 1)[1]]
    close = difflib.get_close_matches(str(loc[-1]), node["properties"], n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(node['properties'])}"


def _below(node: dict[str, Any], part: str | int) -> dict[str, Any]:
    if isinstance(part, int):
        return node["items"]
    if part in node.get("properties", ()):
        return node["properties"][part]
    return next(iter(node["patternProperties"].values()))  # a mapping whose keys the user chooses
