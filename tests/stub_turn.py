"""A turn for tests, in the place of the router's, with chunks that the test supplies."""

from __future__ import annotations

from collections.abc import AsyncIterator

from prefillshare.kvshare.handoff import TokenChunk
from prefillshare.kvshare.usage import TurnUsage


class StubTurn:
    def __init__(self, chunks: AsyncIterator[TokenChunk]):
        self._chunks, self.usage = chunks, TurnUsage()
        self.lent = self.salt = None

    def chunks(self) -> AsyncIterator[TokenChunk]:
        return self._chunks

    def text_has_ended(self) -> None: ...
