"""Threads: the contexts that responses and conversations go on from, each of them a session with notes.

A response is a place in a thread. Its id names the thread, so that every router finds it; the thread's note of that id says the
rest. Who goes on from the thread's last response extends the thread; who goes on from an earlier one, or while the thread is
held, extends a fork that ends at that place. A thread that is unused for long ends, with all its responses.

A call that names no response, and sends the whole history instead, is recognised by what was said: the store finds the thread,
and the response in it, by the transcript (router/sessions/ends.py), for every router.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from prefillshare.kvshare.errors import (
    Conflict,
    ContractMismatch,
    NotFound,
    Overloaded,
    PrefillShareError,
    SessionBusy,
    SessionDamaged,
)
from prefillshare.router.responses.items import Item
from prefillshare.router.sessions.base import Mark, OwnPart, Session, SessionStore
from prefillshare.router.sessions.transcript import Transcript

logger = logging.getLogger(__name__)

_RESPONSE = re.compile(r"resp_((?:conv_)?[0-9a-f]{32})([0-9a-f]{12})")


def new_thread() -> str:
    return uuid.uuid4().hex


def new_response(thread: str) -> str:
    return f"resp_{thread}{uuid.uuid4().hex[:12]}"


def is_conversation(thread: str) -> bool:
    return thread.startswith("conv_")


@contextmanager
def told_of(what: str, field: str) -> Iterator[None]:
    """Whatever the store refuses here is told in words of clients, who know responses and conversations, and no sessions."""
    try:
        yield
    except Overloaded as error:
        raise Overloaded(
            "calls in progress go on from as many responses and conversations as a tenant may have stored",
            field="router.max_responses",
            retry_after_s=error.retry_after_s,
            fix="try again when some of them have ended, or set store to false",
        ) from None
    except (Conflict, ContractMismatch, NotFound) as error:
        if error.field != "session_id":
            raise
        raise _as_told(error, what, field) from None


def _as_told(error: Conflict | ContractMismatch | NotFound, what: str, field: str) -> PrefillShareError:
    match error:
        case ContractMismatch():
            text = f"{what} consists of {error.message.partition('consists of ')[2]}"
            return ContractMismatch(text, field=field, fix="begin anew, or serve the base that it was begun with")
        case SessionBusy():
            fix = "wait until it has ended, and send this again"
            return SessionBusy(f"another call goes on from {what}, or changes it", field=field, fix=fix)
        case Conflict():
            text = f"{what} was deleted or changed while this call was served, of which nothing was kept"
            return Conflict(text, field=field, fix="send it again, behind what is there now")
        case SessionDamaged():
            return damaged(what, field)
    return NotFound(f"{what} has been deleted, or was unused for too long", field=field, fix="begin anew")


def damaged(what: str, field: str) -> SessionDamaged:
    return SessionDamaged(f"{what} is damaged in the store and cannot be read", field=field, fix="delete it and begin anew")


@dataclass(frozen=True)
class StoredResponse:
    """`body`: the response as its client got it. `mark`: where it ends in its thread; None if nothing can go on from there any
    more. `unanswered`: ids of function calls up to there that have no output yet."""

    thread: str
    body: Mapping[str, Any]
    input_items: Sequence[Item]
    mark: Mark | None
    unanswered: Sequence[str] = field(default_factory=list)

    def written(self) -> str:
        mark = None
        if at := self.mark:
            mark = [at.tokens, at.open_response, str(at.transcript or ""), str(at.own or "")]
        return json.dumps({"body": self.body, "input": self.input_items, "mark": mark, "unanswered": self.unanswered})

    @classmethod
    def read(cls, thread: str, written: str) -> StoredResponse:
        """Raises ValueError, KeyError or TypeError for what `written` has not written."""
        data, mark = json.loads(written), None
        if data["mark"] is not None:
            tokens, is_open, transcript, own = data["mark"]
            mark = Mark(int(tokens), bool(is_open), Transcript.parsed(transcript), OwnPart.parsed(own))
        return cls(thread, data["body"], data["input"], mark, data["unanswered"])


class Threads:
    """`sessions`: the store that holds them, apart from clients' own sessions."""

    #: Most answers of a history, from its end on, of which one may be that of a stored response.
    MOST_LOOKED_UP = 64

    def __init__(self, sessions: SessionStore):
        self.sessions = sessions

    async def response(self, response_id: str, tenant: str, field: str) -> StoredResponse:
        """Raises NotFound for a response that is unknown, gone, or another tenant's."""
        thread, note = await self._note(response_id, tenant, field)
        try:
            return StoredResponse.read(thread, note)
        except (ValueError, KeyError, TypeError):
            raise damaged(f"response {response_id!r}", field) from None

    async def _note(self, response_id: str, tenant: str, field: str) -> tuple[str, str]:
        """The response's thread, and the thread's note of it."""
        found = _RESPONSE.fullmatch(response_id)
        unknown = NotFound(
            f"no response {response_id[:128]!r}; it was never stored (store: false), was deleted, was unused for"
            f" {self.sessions.ttl_s:g} s, or made room for newer ones",
            field=field,
        )
        if not found:
            raise unknown
        try:
            notes = await self.sessions.notes(found[1], tenant=tenant, keys=[response_id])
        except SessionDamaged:
            raise damaged(f"response {response_id!r}", field) from None
        except NotFound:
            raise unknown from None
        if response_id not in notes:
            raise unknown
        return found[1], notes[response_id]

    async def forget(self, response_id: str, tenant: str) -> None:
        """Delete a response; with the last one of a thread that is no conversation, the thread. Raises NotFound."""
        thread, _ = await self._note(response_id, tenant, "response_id")
        with told_of(f"response {response_id!r}", "response_id"):
            await self.sessions.note(thread, {response_id: None}, tenant=tenant)
            left = await self.sessions.notes(thread, tenant=tenant)
            # A call that goes on from there will have its own response in the thread.
            if not left and not (await self.sessions.get(thread, tenant=tenant)).busy:
                await self.sessions.delete(thread, tenant=tenant)

    async def keep(
        self, session: Session, context: Sequence[int], stored: StoredResponse, notes: Mapping[str, str]
    ) -> None:
        """End the turn that made a response. `session`: its thread, held. `notes`: further ones of the thread."""
        mark, response_id = stored.mark, stored.body["id"]
        all_notes = {response_id: stored.written(), **notes}
        said, is_open = mark.transcript, mark.open_response
        await self.sessions.commit(session, context, is_open, said, all_notes, mark.own, end=response_id)

    async def found(self, messages: Sequence[Mapping[str, Any]], tenant: str) -> StoredResponse | None:
        """The response with which the longest beginning of these messages ends, if it is there and one may go on from it.
        Raises Unavailable."""
        said, ends = Transcript(), []
        for message in messages[:-1]:
            said = said.with_messages([message])
            if message["role"] == "assistant":
                ends.append(said)
        if not ends or (end := await self.sessions.found(ends[: -self.MOST_LOOKED_UP - 1 : -1], tenant=tenant)) is None:
            return None
        try:
            stored = StoredResponse.read(end.session_id, end.note)
        except (ValueError, KeyError, TypeError):
            logger.warning("response %s is damaged in the store, and not gone on from", end.key)
            return None
        return stored if stored.mark and stored.mark.transcript else None

    async def moved(self, thread: str, tenant: str) -> dict[str, str]:
        """Notes of a thread that is being laid out anew: nothing can go on from where its responses have ended."""
        notes = await self.sessions.notes(thread, tenant=tenant)
        moved = {}
        for key, note in notes.items():
            with suppress(ValueError, KeyError, TypeError):  # damaged: it is not gone on from anyway
                if _RESPONSE.fullmatch(key) and (response := StoredResponse.read(thread, note)).mark:
                    moved[key] = replace(response, mark=None).written()
        return moved
