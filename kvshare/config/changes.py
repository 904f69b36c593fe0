"""What a change of a field does to a deployment that runs (`prefillshare apply`), said at the field:

    max_queued: Annotated[int, TAKEN_OVER] = Field(256, ge=1)

A section says by `CHANGE` what holds of all its other fields. Fields of a section that has no CHANGE are sections themselves,
or bear what holds of them as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel


@dataclass(frozen=True)
class Change:
    """`does`: for whoever reads the documentation. `refused`: why it cannot be made, and `fix` what can be done instead."""

    does: str
    replaces_routers: bool = False
    replaces_engines: bool = False
    refused: str = ""
    fix: str = ""

    @property
    def is_taken_over(self) -> bool:
        """By a router that runs."""
        return not self.replaces_routers and not self.refused


TAKEN_OVER = Change("taken over")
ROUTERS = Change("routers are replaced", replaces_routers=True)
ENGINES = Change("engines are replaced", replaces_engines=True)
BOTH = Change("engines and routers are replaced", replaces_routers=True, replaces_engines=True)


def refused(why: str, fix: str) -> Change:
    return Change(f"refused: {fix}", refused=why, fix=fix)


def of(node: type[BaseModel]) -> dict[str, Change | None]:
    """By field; None: it is a section, whose fields say so themselves."""
    others = getattr(node, "CHANGE", None)
    return {
        name: next((one for one in info.metadata if isinstance(one, Change)), others)
        for name, info in node.model_fields.items()
    }


def leaves(node: BaseModel, path: str = "") -> Iterator[tuple[str, Change, object]]:
    """(path, change, value) of all fields that bear a change, sections entered."""
    for name, change in of(type(node)).items():
        value = getattr(node, name)
        if change is None:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", change, value
