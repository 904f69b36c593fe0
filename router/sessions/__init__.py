"""Sessions: a context as token ids, extended turn by turn. In memory for one router, in Redis for several."""

from router.sessions.base import Session, SessionStore
from router.sessions.lifecycle import SessionGauge, open_sessions
from router.sessions.memory import MemorySessions
from router.sessions.redis import RedisSessions

__all__ = ["MemorySessions", "RedisSessions", "Session", "SessionGauge", "SessionStore", "open_sessions"]
