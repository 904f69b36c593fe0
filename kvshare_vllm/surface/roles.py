"""Whom a chat message may be from, over both surfaces. vLLM takes any role, and a template that does not know it lays the
message out somehow, or leaves it out."""

from __future__ import annotations

from collections.abc import Sequence

from prefillshare.kvshare.errors import InvalidInput

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_role(role: object, field: str, roles: Sequence[str] = ROLES) -> None:
    """`field`: that of the message. Raises InvalidInput."""
    if role not in roles:
        what = "a message without a role" if not role else f"unknown role {str(role)[:64]!r}"
        raise InvalidInput(what, field=f"{field}.role", fix=f"use one of {', '.join(roles)}")
