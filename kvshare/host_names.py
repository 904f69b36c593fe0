"""Hosts as HTTP clients name them in a request's `Host` header, and which of them cannot belong to somebody else.

A web site can point a name of its own at an address that its visitors can reach and the site cannot (DNS rebinding). The
browser then takes what answers there for a part of the site. The header says which name the browser was given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address

ANY = "*"
_NAME = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*")


def problem(names: Sequence[str]) -> str:
    """Empty if each is a host's name as `named` returns it, or ANY alone; else what is wrong."""
    if ANY in names and len(names) > 1:
        return f'"{ANY}" allows every host; remove the others or "{ANY}"'
    for name in names:
        if name != ANY and not _NAME.fullmatch(name):
            allowed = f'"{ANY}", or a name like "agents.example.org", in lower case and without a port'
            return f"{name!r} is no host name; allowed: {allowed}"
    return ""


def named(header: str) -> str:
    """The host in a `Host` header, in lower case and without its port; "" if the header has none."""
    bracketed = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](:\d*)?", header)
    host = bracketed[1] if bracketed else re.sub(r":\d*$", "", header)
    return host.lower().removesuffix(".")


def cannot_be_rebound(host: str) -> bool:
    """An IP address, which no name server answers for, or a name that browsers take for this machine's own."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
