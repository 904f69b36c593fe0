"""Sessions: a context as token ids, extended turn by turn. In memory for one router, in Redis for several."""

from prefillshare.router.sessions.base import Session, SessionStore
from prefillshare.router.sessions.lifecycle import SessionGauge, open_sessions, open_threads
from prefillshare.router.sessions.memory import MemorySessions
from prefillshare.router.sessions.redis import RedisSessions

__all__ = ["MemorySessions", "RedisSessions", "Session", "SessionGauge", "SessionStore", "open_sessions", "open_threads"]
