"""A private redis-server on a loopback port, for tests and benchmarks."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

START_TIMEOUT_S = 30


class RedisServer:
    """Keeps its data in `folder`: writes that it has answered are there again after `kill` and `start`."""

    def __init__(self, folder: Path, port: int, password: str = ""):
        self._folder, self.port, self._password = folder, port, password
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    @property
    def url(self) -> str:
        login = f":{quote(self._password, safe='')}@" if self._password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        options = {
            "port": self.port, "bind": "127.0.0.1", "dir": self._folder, "save": "", "appendonly": "yes",
            "appendfsync": "no", "logfile": self._folder / "log", "requirepass": self._password,
        }  # fmt: skip
        command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
        try:
            self._process = subprocess.Popen(command)
        except FileNotFoundError:
            raise RuntimeError("redis-server is not installed: apt-get install redis-server") from None
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"redis-server did not start:\n{(self._folder / 'log').read_text()}")
            time.sleep(0.01)

    def kill(self) -> None:
        if self._process is None:
            return
        self.resume()
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """From now on it accepts connections but does not answer."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=START_TIMEOUT_S) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except ConnectionError:
            return False
