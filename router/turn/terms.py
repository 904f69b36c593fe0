"""The conditions under which a turn is taken, besides what it asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Terms:
    #: Seconds the client waits; None: the deployment's default.
    deadline_s: float | None = None
    #: Pool -> replica that its session's last turn ran on. The turn notes its own there.
    replicas: dict[str, str] = field(default_factory=dict)
    #: Whether the decode engine is to lend the context's KV at the end, if its mode allows that.
    lend: bool = False
    #: Awaited, within the turn's time, before its prefix is looked up; None: nothing is to be waited for.
    ready: Callable[[], Awaitable[None]] | None = None
    #: Name of the session whose turn this is; "": it is no session's.
    session: str = ""
    #: The router takes the turn for itself, to find out whether one would succeed: it is no client's, and nobody is charged.
    is_probe: bool = False
