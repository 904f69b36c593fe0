"""Messages of the contract out of plain values. What does not fit is refused with its field."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message as Proto

from prefillshare.kvshare.errors import InvalidInput

P = TypeVar("P", bound=Proto)


def built(kind: type[P], values: Mapping[str, Any], before: str = "") -> P:
    """A message with these values. Raises InvalidInput that names the one which does not fit."""
    made = kind()
    for name, value in values.items():
        if _is_list(kind, name) and isinstance(value, str | bytes | bytearray | Mapping):  # protobuf would take its parts
            raise InvalidInput(f"{value!r:.60} is no list", field=f"{before}{name}", fix="give a list")
        try:
            made.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError, OverflowError) as error:
            text = f"{value!r:.60} does not fit: {error}"
            raise InvalidInput(text, field=f"{before}{name}", fix="see docs/client.md for what it may be") from None
    return made


def _is_list(kind: type[Proto], name: str) -> bool:
    field = kind.DESCRIPTOR.fields_by_name[name]
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    return field.is_repeated and not is_map


def check_names(given: Mapping[str, Any], known: Collection[str], before: str = "") -> None:
    """A field that is None asks for nothing."""
    for name, value in given.items():
        if name not in known and value is not None:
            near = difflib.get_close_matches(str(name), known, 1)
            fix = f"write {near[0]}" if near else f"use {', '.join(sorted(known))}"
            raise InvalidInput("there is no such field", field=f"{before}{name}", fix=fix)


def objects(given: Any, field: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Each with its field's name. None: there are none."""
    if isinstance(given, str | Mapping) or not isinstance(given or (), Iterable):
        raise InvalidInput(f"{given!r:.60} is no list", field=field, fix="give a list")
    items = list(given or ())
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise InvalidInput(f"{item!r:.60} is no object", field=f"{field}.{number}", fix="see docs/client.md for its keys")
    return [(f"{field}.{number}", item) for number, item in enumerate(items)]


def as_json(given: Any, field: str) -> str:
    """Text is taken for JSON."""
    try:
        return given if isinstance(given, str) else json.dumps(given)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{given!r:.60} cannot be written as JSON: {error}", field=field, fix="give plain data") from None
