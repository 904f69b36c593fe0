"""Addresses that only this machine reaches."""

from __future__ import annotations

import ipaddress

ADDRESS = "127.0.0.1"
#: Linux' name of the interface.
INTERFACE = "lo"


def is_loopback(host: str) -> bool:
    """Of an address; of names, "localhost" alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
