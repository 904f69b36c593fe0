"""Runs where Ray would start Python for a worker: python -I -S stand_in.py SOCKET SPARES SCRIPT ARGUMENTS

Asks the server for a process that runs the script, and ends when that process ends. Nothing slow is imported here.
"""

import os
import socket
import sys

#: The answer once there is a process.
STARTED = b"+"
#: Seconds to wait for the server, which may still be importing.
PATIENCE_S = 50


def main(address: str, spares: str, *argv: str) -> None:
    sys.path.insert(0, os.path.dirname(__file__))
    from passing import Program, named

    server = socket.socket(socket.AF_UNIX)
    try:
        server.settimeout(PATIENCE_S)
        with named(address) as name:
            server.connect(name)
        Program([spares, *argv]).send(server)
        started = server.recv(1) == STARTED
    except OSError:
        started = False
    if not started:
        server.close()
        os.execv(sys.executable, [sys.executable, *argv])
    server.settimeout(None)
    while server.recv(1):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
