"""Host and port in the form that URLs, sockets and gRPC need, IPv6 included."""

from __future__ import annotations

import socket


def joined(host: str, port: int) -> str:
    """HOST:PORT, or [HOST]:PORT if the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def family(host: str) -> socket.AddressFamily:
    """Address family of a socket that listens on this host."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
