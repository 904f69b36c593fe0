"""Conversations (OpenAI's Conversations API): threads that clients name, with their items.

An item that is added is laid out behind the thread's token ids. When one is taken out, the thread is laid out anew from the
items that are left: then answers are tokenised from their text, which need not give the tokens that were generated.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from typing import Any

from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.errors import InvalidInput, NotFound, SessionDamaged
from prefillshare.kvshare_vllm.surface.responses_route import Items
from prefillshare.router.responses.items import Item, items_of, page, unanswered
from prefillshare.router.responses.threads import Threads, damaged, new_thread, told_of
from prefillshare.router.sessions.agent_layout import AgentLayout
from prefillshare.router.sessions.base import Session
from prefillshare.router.sessions.http_calls import HttpCalls
from prefillshare.router.sessions.transcript import Transcript

#: Most items that one call may add (OpenAI's).
MOST_ITEMS = 20
MOST_METADATA, MOST_KEY_CHARS, MOST_VALUE_CHARS = 16, 64, 512


class ConversationNotes:
    """What a conversation's thread says besides its tokens. `data`: the conversation itself, as its client sees it."""

    KEY, ITEM = "conversation", "item:"

    def __init__(self, thread: str, data: Mapping[str, Any], next_item: int = 0, unanswered: Sequence[str] = ()):
        self.thread, self.data, self.next_item, self.unanswered = thread, data, next_item, list(unanswered)

    @classmethod
    async def of(cls, threads: Threads, conversation_id: str, tenant: str, field: str) -> ConversationNotes:
        """Raises NotFound for one that is unknown, gone, or another tenant's."""
        unknown = NotFound(
            f"no conversation {conversation_id[:128]!r}; it was never made, was deleted, was unused for"
            f" {threads.sessions.ttl_s:g} s, or made room for newer ones",
            field=field,
        )
        if not conversation_id.startswith("conv_"):
            raise unknown
        try:
            notes = await threads.sessions.notes(conversation_id, tenant=tenant, keys=[cls.KEY])
        except SessionDamaged:
            raise damaged(f"conversation {conversation_id!r}", field) from None
        except NotFound:
            raise unknown from None
        if cls.KEY not in notes:
            raise unknown
        try:
            return cls(conversation_id, *json.loads(notes[cls.KEY]))
        except (ValueError, TypeError):
            raise damaged(f"conversation {conversation_id!r}", field) from None

    def written(self) -> dict[str, str]:
        return {self.KEY: json.dumps([self.data, self.next_item, self.unanswered])}

    def grown(self, items: Sequence[Item], unanswered: Sequence[str]) -> dict[str, str]:
        """The notes to add when the conversation has these further items. Its own state follows."""
        notes = {f"{self.ITEM}{self.next_item + number:08}": json.dumps(item) for number, item in enumerate(items)}
        self.next_item, self.unanswered = self.next_item + len(items), list(unanswered)
        return notes | self.written()


class Conversations:
    """What clients ask of conversations. All methods raise PrefillShareError, and see the calling tenant's only."""

    def __init__(self, threads: Threads, calls: HttpCalls, items: Items):
        self._threads, self._calls, self._items = threads, calls, items

    async def create(self, items: Any, metadata: Any) -> dict[str, Any]:
        conversation_id, caller = f"conv_{new_thread()}", current_caller.get()
        data = {
            "id": conversation_id,
            "object": "conversation",
            "created_at": int(time.time()),
            "metadata": checked_metadata(metadata),
        }
        added = self._checked([] if items is None else items)
        session = Session(conversation_id, caller.tenant, transcript=Transcript())
        token_ids, said = await self._behind(session, added, "items")
        left = unanswered((), added, "items")
        notes = ConversationNotes(conversation_id, data).grown(added, left)
        sessions = self._threads.sessions
        how = {"cache_domain": caller.cache_domain, "transcript": said}
        with _told_of(conversation_id):
            await sessions.create(conversation_id, token_ids, tenant=caller.tenant, **how)
            await sessions.note(conversation_id, notes, tenant=caller.tenant)
        return data

    async def get(self, conversation_id: str) -> dict[str, Any]:
        return dict((await self._notes(conversation_id)).data)

    async def update(self, conversation_id: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if "metadata" not in given:
            raise InvalidInput("nothing is to be changed", field="metadata", fix="send the metadata that it is to have")
        metadata = checked_metadata(given["metadata"])
        async with self._held(conversation_id) as (session, notes):
            notes.data = {**notes.data, "metadata": metadata}
            is_open, said = session.open_response, session.transcript
            await self._threads.sessions.commit(session, session.token_ids, is_open, said, notes.written())
        return dict(notes.data)

    async def delete(self, conversation_id: str) -> dict[str, Any]:
        with suppress(SessionDamaged):  # that is how one is got rid of
            await self._notes(conversation_id)
        with _told_of(conversation_id):
            await self._threads.sessions.delete(conversation_id, tenant=_tenant())
        return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}

    async def items(self, conversation_id: str, *, after: str | None, limit: int, order: str) -> dict[str, Any]:
        return page(await self._listed(conversation_id), after=after, limit=limit, order=order)

    async def item(self, conversation_id: str, item_id: str) -> Item:
        items = {item["id"]: item for item in await self._listed(conversation_id)}
        if item_id not in items:
            raise _no_item(item_id)
        return items[item_id]

    async def add(self, conversation_id: str, items: Any) -> dict[str, Any]:
        if items is None or items == []:
            raise InvalidInput("no item is given", field="items", fix="give at least one")
        added = self._checked(items)
        async with self._held(conversation_id) as (session, notes):
            left = unanswered(notes.unanswered, added, "items")
            token_ids, said = await self._behind(session, added, "items")
            await self._threads.sessions.commit(session, token_ids, False, said, notes.grown(added, left))
        return page(added, after=None, limit=MOST_ITEMS, order="asc")

    async def take_out(self, conversation_id: str, item_id: str) -> dict[str, Any]:
        async with self._held(conversation_id) as (session, notes):
            keys = await self._by_key(conversation_id)
            key = next((key for key, item in keys.items() if item["id"] == item_id), None)
            if key is None:
                raise _no_item(item_id)
            kept = [item for other, item in keys.items() if other != key]
            anew = Session(conversation_id, session.tenant, transcript=Transcript())
            token_ids, said = await self._behind(anew, kept, "item_id")
            notes.unanswered = unanswered((), kept, "item_id")
            all_notes = notes.written() | await self._threads.moved(conversation_id, session.tenant) | {key: None}
            await self._threads.sessions.commit(session, token_ids, False, said, all_notes)
        return dict(notes.data)

    async def _behind(self, session: Session, items: Sequence[Item], field: str) -> tuple[list[int], Transcript]:
        """The session's token ids with these items behind them, and what they say."""
        if not items:
            return list(session.token_ids), session.transcript or Transcript()
        conversation = self._items.conversation(list(items), field)
        text = self._calls.frontend.text
        text.check_chars(conversation.chars, field)
        layout, messages = AgentLayout(self._calls.frontend.renderer.tokenizer, conversation.render), conversation.messages
        token_ids = await text.run(conversation.chars, lambda: layout.added(session.token_ids, session.open_response, messages))
        if len(token_ids) >= self._calls.max_len:
            raise InvalidInput(
                f"{len(token_ids)} tokens leave no room for a response: the model takes {self._calls.max_len}, both together",
                field=field,
                fix="send less, begin another conversation, or raise base.max_model_len",
            )
        return token_ids, (session.transcript or Transcript()).with_messages(messages)

    @asynccontextmanager
    async def _held(self, conversation_id: str) -> AsyncIterator[tuple[Session, ConversationNotes]]:
        """Hold a conversation while it is changed."""
        await self._notes(conversation_id)
        with _told_of(conversation_id):
            async with self._threads.sessions.turn(conversation_id, tenant=_tenant()) as session:
                yield session, await self._notes(conversation_id)

    async def _notes(self, conversation_id: str) -> ConversationNotes:
        return await ConversationNotes.of(self._threads, conversation_id, _tenant(), "conversation_id")

    async def _listed(self, conversation_id: str) -> list[Item]:
        await self._notes(conversation_id)
        return list((await self._by_key(conversation_id)).values())

    async def _by_key(self, conversation_id: str) -> dict[str, Item]:
        """Items by their notes' keys, oldest first."""
        notes = await self._threads.sessions.notes(conversation_id, tenant=_tenant())
        return {key: json.loads(text) for key, text in sorted(notes.items()) if key.startswith(ConversationNotes.ITEM)}

    def _checked(self, items: Any) -> list[Item]:
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise InvalidInput("this is no list of items", field="items", fix="give a list of objects")
        if len(items) > MOST_ITEMS:
            raise InvalidInput(f"{len(items)} items", field="items", fix=f"give at most {MOST_ITEMS} at once")
        self._items.parsed(items, "items")
        return items_of(items, "items")


def checked_metadata(metadata: Any) -> dict[str, str]:
    """Raises InvalidInput."""
    metadata = {} if metadata is None else metadata
    fits = isinstance(metadata, dict) and len(metadata) <= MOST_METADATA
    if not fits or not all(
        isinstance(text, str) and len(key) <= MOST_KEY_CHARS and len(text) <= MOST_VALUE_CHARS
        for key, text in metadata.items()
    ):
        raise InvalidInput(
            "these are no metadata",
            field="metadata",
            fix=f"give at most {MOST_METADATA} texts of {MOST_VALUE_CHARS} characters, by keys of {MOST_KEY_CHARS}",
        )
    return metadata


def _told_of(conversation_id: str) -> AbstractContextManager[None]:
    return told_of(f"conversation {conversation_id!r}", "conversation_id")


def _no_item(item_id: str) -> NotFound:
    return NotFound(f"the conversation has no item {item_id[:128]!r}", field="item_id")


def _tenant() -> str:
    return current_caller.get().tenant
