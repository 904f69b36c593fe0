"""Origins of web pages, as browsers name them in a request's `Origin` header."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

ANY = "*"
_DEFAULT_PORTS = {"http": 80, "https": 443}


def problem(origins: Sequence[str]) -> str:
    """Empty if each is written as browsers name it, else what is wrong."""
    if ANY in origins and len(origins) > 1:
        return f'"{ANY}" allows every origin; remove the others or "{ANY}"'
    for origin in origins:
        if origin != ANY and (expected := _as_named(origin)) != origin:
            hint = f'; browsers name it "{expected}"' if expected else ""
            return f'{origin!r} is no origin; allowed: "{ANY}", or scheme://host[:port] without a path{hint}'
    return ""


def _as_named(origin: str) -> str | None:
    """The origin of this URL as a browser names it; None if it has none."""
    try:
        parts = urlsplit(origin)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not parts.scheme or not host or parts.username is not None or any(c.isspace() or c == "*" for c in origin):
        return None
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, _DEFAULT_PORTS.get(parts.scheme)) else "")
