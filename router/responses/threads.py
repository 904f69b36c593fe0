"""Threads: the contexts that responses and conversations go on from, each of them a session with notes.

A response is a place in a thread. Its id names the thread, so that every router finds it; the thread's note of that id says the
rest. Who goes on from the thread's last response extends the thread; who goes on from an earlier one, or while the thread is
held, extends a fork that ends at that place. A thread that is unused for long ends, with all its responses.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefillshare.kvshare.errors import NotFound
from prefillshare.router.responses.items import Item
from prefillshare.router.sessions.base import Mark, OwnPart, Session, SessionStore
from prefillshare.router.sessions.transcript import Transcript

_RESPONSE = re.compile(r"resp_((?:conv_)?[0-9a-f]{32})([0-9a-f]{12})")


def new_thread() -> str:
    return uuid.uuid4().hex


def new_response(thread: str) -> str:
    return f"resp_{thread}{uuid.uuid4().hex[:12]}"


@dataclass(frozen=True)
class StoredResponse:
    """`body`: the response as its client got it. `mark`: where it ends in its thread. `unanswered`: ids of function calls up to
    there that have no output yet."""

    thread: str
    body: Mapping[str, Any]
    input_items: Sequence[Item]
    mark: Mark
    unanswered: Sequence[str] = field(default_factory=list)

    def written(self) -> str:
        mark = [self.mark.tokens, self.mark.open_response, str(self.mark.transcript or ""), str(self.mark.own or "")]
        return json.dumps({"body": self.body, "input": self.input_items, "mark": mark, "unanswered": self.unanswered})

    @classmethod
    def read(cls, thread: str, written: str) -> StoredResponse:
        """Raises ValueError, KeyError or TypeError for what `written` has not written."""
        data = json.loads(written)
        tokens, is_open, transcript, own = data["mark"]
        mark = Mark(int(tokens), bool(is_open), Transcript.parsed(transcript), OwnPart.parsed(own))
        return cls(thread, data["body"], data["input"], mark, data["unanswered"])


class Threads:
    """`sessions`: the store that holds them, apart from clients' own sessions."""

    #: Transcripts of responses that are remembered, so that a call that sends the whole history goes on from one.
    KNOWN = 4096

    def __init__(self, sessions: SessionStore):
        self.sessions = sessions
        self._known: OrderedDict[tuple[str, Transcript], str] = OrderedDict()

    async def response(self, response_id: str, tenant: str, field: str) -> StoredResponse:
        """Raises NotFound for a response that is unknown, gone, or another tenant's."""
        found = _RESPONSE.fullmatch(response_id)
        unknown = NotFound(
            f"no response {response_id[:128]!r}; it was never stored (store: false), was deleted, or was unused for"
            f" {self.sessions.ttl_s:g} s",
            field=field,
        )
        if not found:
            raise unknown
        try:
            notes = await self.sessions.notes(found[1], tenant=tenant, keys=[response_id])
        except NotFound:
            raise unknown from None
        if response_id not in notes:
            raise unknown
        try:
            return StoredResponse.read(found[1], notes[response_id])
        except (ValueError, KeyError, TypeError):
            raise self.sessions.damaged(response_id) from None

    async def forget(self, response_id: str, tenant: str) -> None:
        """Delete a response; with the last one of a thread that is no conversation, the thread. Raises NotFound."""
        thread = (await self.response(response_id, tenant, "response_id")).thread
        await self.sessions.note(thread, {response_id: None}, tenant=tenant)
        left = await self.sessions.notes(thread, tenant=tenant)
        if not left:
            await self.sessions.delete(thread, tenant=tenant)

    async def keep(
        self, session: Session, context: Sequence[int], stored: StoredResponse, notes: Mapping[str, str]
    ) -> None:
        """End the turn that made a response. `session`: its thread, held. `notes`: further ones of the thread."""
        mark, response_id = stored.mark, stored.body["id"]
        all_notes = {response_id: stored.written(), **notes}
        await self.sessions.commit(session, context, mark.open_response, mark.transcript, all_notes, mark.own)
        if mark.transcript:
            self._known[session.tenant, mark.transcript] = response_id
            self._known.move_to_end((session.tenant, mark.transcript))
            if len(self._known) > self.KNOWN:
                self._known.popitem(last=False)

    async def found(self, messages: Sequence[Mapping[str, Any]], tenant: str) -> StoredResponse | None:
        """The response with which the longest beginning of these messages ends, if this router has made it and it is there."""
        said, ends = Transcript(), []
        for message in messages[:-1]:
            said = said.with_messages([message])
            if response_id := self._known.get((tenant, said)):
                ends.append((said, response_id))
        for said, response_id in reversed(ends):
            try:
                return await self.response(response_id, tenant, "input")
            except NotFound:
                self._known.pop((tenant, said), None)
        return None
