"""The processes of a deployment that this process has started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def titled(actor: str) -> list[psutil.Process]:
    """Processes of Ray's actors of that name; a process title may go on with the method that the actor runs."""
    return [process for process, title in _titles() if title == actor or title.startswith(f"{actor}.")]


def routers(grpc_port: int) -> list[psutil.Process]:
    """The routers that listen on this port; one that is starting or ending does not."""
    return [process for process in titled("ray::ServeReplica:prefillshare:router") if grpc_port in _listening(process)]


def _listening(process: psutil.Process) -> set[int]:
    try:
        return {one.laddr.port for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    except psutil.Error:
        return set()


def _titles() -> Iterator[tuple[psutil.Process, str]]:
    for process in psutil.Process().children(recursive=True):
        try:
            yield process, (process.cmdline() or [""])[0]
        except psutil.Error:
            continue


@contextmanager
def stopped(victims: list[psutil.Process]) -> Iterator[None]:
    """Have these processes hang while the block runs."""
    for process in victims:
        process.suspend()
    try:
        yield
    finally:
        for process in victims:
            process.resume()
