"""Whom a chat message may be from, over both surfaces. vLLM takes any role, and a template that does not know it lays the
message out somehow, or leaves it out."""

from __future__ import annotations

from prefillshare.kvshare.errors import InvalidInput

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_role(role: object, field: str) -> None:
    """`field`: that of the message. Raises InvalidInput."""
    if role not in ROLES:
        raise InvalidInput(f"unknown role {str(role)[:64]!r}", field=f"{field}.role", fix=f"use one of {', '.join(ROLES)}")
