"""A loopback port for a server under test."""

import random
import socket


def free_port() -> int:
    """A port outside the range from which the system hands out ports: Ray's workers take ports of that range while a deployment
    starts, and a server must find its port free again after a restart."""
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
