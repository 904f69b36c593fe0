"""Placement: which replica takes a request. Narrow on purpose: a snapshot in, a replica id out.

Here: the session's last replica if it is still there (its cache is), else least outstanding work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvshare.errors import Unavailable


def place(pool: str, replicas: Sequence[str], outstanding: Mapping[str, int], sticky: str | None = None) -> str:
    """Pick one of `replicas`. Raises Unavailable where there is none."""
    if not replicas:
        raise Unavailable(f"no replica of {pool} is ready", fix="try again when it has started")
    if sticky in replicas:
        return sticky
    return min(replicas, key=lambda r: (outstanding.get(r, 0), r))
