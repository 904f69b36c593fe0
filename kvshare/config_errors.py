"""What pydantic found wrong with a deployment file, in the words of the file: field's path, value, what is allowed."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from kvshare.errors import ConfigError

#: pydantic's words for kinds of value, in the words of YAML.
_SHOULD_BE = {
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "tuple_type": "should be a list",
    "too_short": "should have at least one entry",
    "string_too_short": "should not be empty",
}


def as_config_error(error: ValidationError, root: type[BaseModel]) -> ConfigError:
    """One ConfigError for all that pydantic found wrong with a tree of type `root`; its `field` is the first bad field."""
    problems = []
    items = error.errors()
    for item in items:
        if item["type"] == "too_short" and any(i["loc"][: len(item["loc"])] == item["loc"] for i in items if i is not item):
            continue  # pydantic counts only the entries that are right
        field = ".".join(str(part) for part in item["loc"] if part != "[key]")
        if item["type"] == "extra_forbidden":
            message = f"unknown key{_did_you_mean(item['loc'], root.model_json_schema())}"
        elif item["type"] == "missing":
            message = "required, but not given"
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
        else:
            message = f"{_SHOULD_BE.get(item['type'], item['msg'])}, got {shown(item['input'])}"
        problems.append((field, message))
    field, message = problems[0]
    rest = "".join(f"\n  {f}: {m}" if f else f"\n  {m}" for f, m in problems[1:])
    return ConfigError(message + rest, field=field or None)


def shown(value: Any) -> str:
    """A value as an error message shows it."""
    if isinstance(value, dict | list) and value:
        return "a mapping" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else repr(value)


def _did_you_mean(loc: tuple, schema: dict[str, Any]) -> str:
    node = schema
    for part in loc[:-1]:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
        for choice in (node, *node.get("anyOf", ())):
            if "$ref" in choice:
                node = schema["$defs"][choice["$ref"].rsplit("/", 1)[1]]
    close = difflib.get_close_matches(str(loc[-1]), node["properties"], n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(node['properties'])}"
