"""Addresses that only this machine can reach."""

from __future__ import annotations

import ipaddress

ADDRESS = "127.0.0.1"
#: Name of the interface on Linux.
INTERFACE = "lo"


def is_loopback(host: str) -> bool:
    """`host`: an address, or a name, of which only "localhost" counts as loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
