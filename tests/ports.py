"""A loopback port for a server under test."""

import random
import socket


def free_port() -> int:
    """Outside the range from which the system hands out ports: Ray's workers take those while a deployment starts, and a
    server finds its own again after a restart."""
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
