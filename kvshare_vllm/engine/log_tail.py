"""The end of an engine's log, kept for the error that says why the engine did not start or died."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from contextlib import suppress
from multiprocessing import resource_tracker


class LogTail:
    """While entered, what this process and its children write to stdout and stderr also passes through here.

    The text goes on to where it went before. Children started meanwhile keep writing here until they end; the reader
    thread ends when the last writer does, and `close` waits for it.
    """

    def __init__(self, lines: int = 60):
        self._lines: deque[bytes] = deque(maxlen=lines)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LogTail:
        sys.stdout.flush()
        sys.stderr.flush()
        resource_tracker.ensure_running()  # before the pipe exists: it outlives the engine and would keep the pipe open
        self._saved = (os.dup(1), os.dup(2))
        read, write = os.pipe()
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(write)
        self._thread = threading.Thread(target=self._copy, args=(read, os.dup(self._saved[1])), name="engine-log", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for saved, fd in zip(self._saved, (1, 2), strict=True):
            os.dup2(saved, fd)
            os.close(saved)

    def _copy(self, read: int, onward: int) -> None:
        with os.fdopen(read, "rb") as source, os.fdopen(onward, "wb", buffering=0) as sink:
            for line in source:
                self._lines.append(line)
                with suppress(OSError):  # a full disk must not block the engine's next line
                    sink.write(line)

    def text(self) -> str:
        return b"".join(self._lines).decode(errors="replace").rstrip()

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait for the reader, which ends once the engine's processes have ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)
