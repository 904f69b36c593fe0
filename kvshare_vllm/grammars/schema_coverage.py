"""Which JSON schemas engines enforce in full. Finds the keywords that xgrammar silently ignores.

Seam: xgrammar's json_schema_converter; vllm/v1/structured_output/backend_xgrammar.py knows some more (it is asked, too)
"""

from __future__ import annotations

from typing import Any

#: Ignored wherever they appear.
_NEVER = frozenset({
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef",
    "uniqueItems", "multipleOf",
})  # fmt: skip
_OF_STRINGS = frozenset({"minLength", "maxLength", "pattern", "format"})
_OF_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_OF_OBJECTS = frozenset({"required", "minProperties", "maxProperties"})
_OF_ARRAYS = frozenset({"minItems", "maxItems", "contains", "minContains", "maxContains"})
_IMPLY_A_TYPE = {"object": ("properties", "patternProperties", "additionalProperties"), "array": ("items", "prefixItems")}
_CONSTRAINTS = _OF_STRINGS | _OF_NUMBERS | _OF_OBJECTS | _OF_ARRAYS | {n for names in _IMPLY_A_TYPE.values() for n in names}
#: Beside one of these, other keywords are ignored.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_NAMED, _LISTED = ("properties", "patternProperties", "$defs", "definitions"), ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "unevaluatedProperties", "propertyNames", "contains", "unevaluatedItems")


def not_held(schema: Any) -> str | None:
    """Path and name of a keyword of the schema that would not be enforced; None if there is none."""
    left: list[tuple[str, Any]] = [("", schema)]
    while left:
        path, node = left.pop()
        if not isinstance(node, dict):
            continue
        if name := _passed_over(node):
            return f"{path}.{name}".lstrip(".")
        for key in _NAMED:
            if isinstance(node.get(key), dict):
                left += [(f"{path}.{key}.{name}", value) for name, value in node[key].items()]
        for key in _LISTED:
            if isinstance(node.get(key), list):
                left += [(f"{path}.{key}.{number}", value) for number, value in enumerate(node[key])]
        left += [(f"{path}.{key}", node[key]) for key in _SINGLE if key in node]
    return None


def _passed_over(node: dict) -> str | None:
    for name in sorted(_NEVER & node.keys()):
        if node[name] is not False:
            return name
    constraints = _CONSTRAINTS & node.keys()
    if alone := next((name for name in _ALONE if name in node), None):
        beside = constraints or {name for name in _ALONE if name in node and name not in (alone, "const", "enum")}
        return f"{min(beside)} (beside {alone})" if beside else None
    if "type" in node or not constraints:
        return None
    for kind, names in (("string", _OF_STRINGS), ("number", _OF_NUMBERS), ("object", _OF_OBJECTS), ("array", _OF_ARRAYS)):
        if (found := constraints & names) and not any(name in node for name in _IMPLY_A_TYPE.get(kind, ())):
            return f"{min(found)} (without a type)"
    return None
