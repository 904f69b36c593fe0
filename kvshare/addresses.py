"""Host and port as URLs, sockets and gRPC want them, IPv6 included."""

from __future__ import annotations

import socket


def joined(host: str, port: int) -> str:
    """HOST:PORT, and [HOST]:PORT where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def family(host: str) -> socket.AddressFamily:
    """Of a socket that listens there."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
