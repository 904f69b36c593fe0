"""Calls of libraries that may never return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(limit_s: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises. Raises TimeoutError after `limit_s` seconds; the call then goes on in its thread, which
    does not keep the process from ending."""
    done: list[tuple[bool, T | BaseException]] = []
    thread = threading.Thread(target=lambda: done.append(_outcome(call)), name="within", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not done:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    (has_failed, outcome), *_ = done
    if has_failed:
        raise outcome
    return outcome


def _outcome(call: Callable[[], T]) -> tuple[bool, T | BaseException]:
    try:
        return False, call()
    except BaseException as error:
        return True, error
