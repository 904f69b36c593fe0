"""What a body that is not as a route expects it is refused with: the field as its client has sent it, and what belongs there.

Where a value may be one of many kinds, pydantic lists everything that keeps it from being each of them, hundreds of problems.
A client is told the first of the kind that the value comes closest to.

Seam: vllm/entrypoints/serve/exception_handling/handlers/validation.py (validation_exception_handler,
_is_internal_loc_segment)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling.handlers.validation import _is_internal_loc_segment

Errors = Sequence[Mapping[str, Any]]
Place = tuple[str, ...]

#: Where FastAPI has found a value; clients know no such names.
_SOURCES = frozenset({"body", "query", "path", "header"})
MOST_CHARS = 500


def tell_wrong_fields(app: FastAPI) -> None:
    """Called before anything is put around the app."""
    for kind in (RequestValidationError, ValidationError):  # the second: of what a route makes of a request
        app.add_exception_handler(kind, _refuse)
    app.middleware_stack = app.build_middleware_stack()  # the one that vLLM has built has its own handler


async def _refuse(_: Request, refused: RequestValidationError | ValidationError) -> JSONResponse:
    field, text = told(refused.errors())
    error = {"message": f"{field}: {text}" if field else text, "type": "BadRequestError", "param": field, "code": 400}
    return JSONResponse({"error": error}, 400)


def told(errors: Errors) -> tuple[str | None, str]:
    """The field, and what is wrong with it."""
    for error in errors:
        if error["type"] == "json_invalid":
            return None, f"the body is not JSON: {error['ctx']['error']} (fix: send a JSON object)"
    places = [(_place(error["loc"]), error) for error in errors]
    place, error = _nearest(places)
    field = ".".join(part for part in place if not _is_kind(part)) or None
    return field, "it is missing (fix: send it)" if error["type"] == "missing" else str(error["msg"])[:MOST_CHARS]


def _nearest(places: list[tuple[Place, Mapping[str, Any]]]) -> tuple[Place, Mapping[str, Any]]:
    """Of problems of several kinds at one place, the first of the kind that has no wrong `type`, and then the fewest."""
    deepest = [one for one in places if not any(_begins(other, one[0]) for other, _ in places)]
    common = _common([place for place, _ in deepest])
    kinds: dict[Place, list[tuple[Place, Mapping[str, Any]]]] = {}
    for place, error in deepest:
        kinds.setdefault(place[len(common) : len(common) + 1], []).append((place, error))
    if not any(_is_kind(part) for kind in kinds for part in kind):
        return deepest[0]
    nearest = min(kinds.values(), key=lambda found: (any(place[-1] == "type" for place, _ in found), len(found)))
    if any(place[-1] == "type" for place, _ in nearest):
        return common, {"type": "value_error", "msg": "this is of none of the types that may stand here"}
    return nearest[0]


def _common(places: Sequence[Place]) -> Place:
    return Place(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*places, strict=False)))


def _begins(longer: Place, place: Place) -> bool:
    return len(longer) > len(place) and longer[: len(place)] == place


def _place(loc: Sequence[Any]) -> Place:
    """Without pydantic's marks of its own, among which vLLM counts a field's name."""
    parts = Place(part for part in map(str, loc) if part == "arguments" or not _is_internal_loc_segment(part))
    return parts[1:] if parts[:1] and parts[0] in _SOURCES else parts


def _is_kind(part: str) -> bool:
    """Whether a part of a place is the name of a class, one of those that a value may be of."""
    return part[:1].isupper()
