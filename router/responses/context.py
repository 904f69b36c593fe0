"""What a response goes on from: an earlier response or a conversation that its call names, a response that is recognised in the
history that its call sends, or nothing. It is held while a response that is to be stored is made.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress

from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.errors import Conflict, ContractMismatch, InvalidInput, NotFound, PrefillShareError
from prefillshare.router.responses.conversations import ConversationNotes
from prefillshare.router.responses.items import Item, unanswered
from prefillshare.router.responses.threads import StoredResponse, Threads, is_conversation, new_thread, told_of
from prefillshare.router.sessions.agent_layout import Messages
from prefillshare.router.sessions.base import Session
from prefillshare.router.sessions.transcript import Transcript

logger = logging.getLogger(__name__)


class ResponseContext:
    """Of one call. `stack`: as of ResponseCall. Set `is_kept` when the response has been stored in it."""

    def __init__(self, threads: Threads, stack: AsyncExitStack):
        self._threads, self._stack, self._tenant = threads, stack, current_caller.get().tenant
        self._previous: StoredResponse | None = None
        self.conversation: ConversationNotes | None = None
        #: Ids of the function calls that have no output yet, the call's own items included.
        self.unanswered: list[str] = []
        self.is_kept = False

    async def find(self, request, items: Sequence[Item]) -> None:
        """What the call names. `items`: what it sends. Raises InvalidInput, NotFound, Unavailable."""
        self._items, response_id, conversation_id = items, request.previous_response_id, _conversation_of(request)
        if conversation_id and response_id is not None:
            raise InvalidInput("a response goes on from one or the other", field="conversation", fix="leave one of them out")
        before: Sequence[str] = ()
        if response_id is not None:
            self._previous = await self._threads.response(response_id, self._tenant, "previous_response_id")
            before = self._previous.unanswered
            if self._previous.mark is None:
                raise InvalidInput(
                    "an item that came before this response has been taken out of its conversation",
                    field="previous_response_id",
                    fix="send the conversation instead",
                )
        if conversation_id:
            self.conversation = await ConversationNotes.of(self._threads, conversation_id, self._tenant, "conversation")
            before = self.conversation.unanswered
        if not items and not self.is_named:
            raise InvalidInput("nothing is asked", field="input", fix="send a text or at least one item")
        self.unanswered = unanswered(before, items, "input")

    @property
    def is_named(self) -> bool:
        return bool(self._previous or self.conversation)

    @property
    def told(self) -> tuple[str, str]:
        """What it is, and the field that says so (`told_of`)."""
        if self.conversation:
            return f"conversation {self.conversation.thread!r}", "conversation"
        if self._previous:
            return f"response {self._previous.body['id']!r}", "previous_response_id"
        return "the response's context", "input"

    async def begin(self, said: Messages, *, stores: bool) -> tuple[Session, Messages]:
        """The context, held if it is to store the response, and what of the messages it does not say yet. Raises as the
        store does, in words of clients."""
        sessions, caller = self._threads.sessions, current_caller.get()
        if not self.is_named and (found := await self._threads.found(said, self._tenant)):
            with suppress(NotFound, Conflict, ContractMismatch), told_of(*self.told):  # it has been deleted or replaced since
                return await self._behind(found, stores), said[found.mark.transcript.count :]
        with told_of(*self.told):
            if self.conversation:
                return await self._in_conversation(self.conversation.thread, stores), said
            if self._previous:
                return await self._behind(self._previous, stores), said
            if not stores:
                return Session("", self._tenant, cache_domain=caller.cache_domain), said
            how = {"cache_domain": caller.cache_domain, "transcript": Transcript()}
            thread = await sessions.create(new_thread(), tenant=self._tenant, **how)
            return await self._held_anew(thread.session_id), said

    async def _in_conversation(self, thread: str, stores: bool) -> Session:
        if not stores:
            return await self._threads.sessions.get(thread, tenant=self._tenant)
        session = await self._held(thread)
        # Another call may have ended in it since `find`.
        self.conversation = await ConversationNotes.of(self._threads, thread, self._tenant, "conversation")
        self.unanswered = unanswered(self.conversation.unanswered, self._items, "input")
        return session

    async def _behind(self, previous: StoredResponse, stores: bool) -> Session:
        sessions, thread, mark = self._threads.sessions, previous.thread, previous.mark
        if not stores:
            return (await sessions.get(thread, tenant=self._tenant)).at(mark)
        if not is_conversation(thread):  # what is said in a conversation is among its items
            async with AsyncExitStack() as own:
                with suppress(Conflict):  # another response is being made behind it
                    session = await own.enter_async_context(sessions.turn(thread, tenant=self._tenant))
                    if len(session.token_ids) == mark.tokens:
                        await self._stack.enter_async_context(own.pop_all())
                        return session
        fork = await sessions.fork(thread, new_thread(), tenant=self._tenant, at=mark)
        return await self._held_anew(fork.session_id)

    async def _held_anew(self, thread: str) -> Session:
        """Hold a thread that is deleted again if no response ends up in it."""

        async def tidy() -> None:
            if not self.is_kept:
                try:
                    await self._threads.sessions.delete(thread, tenant=self._tenant)
                except NotFound:
                    pass
                except PrefillShareError as error:
                    logger.warning("thread %s stays until its time has passed: %s", thread, error)

        self._stack.push_async_callback(tidy)
        return await self._held(thread)

    async def _held(self, thread: str) -> Session:
        return await self._stack.enter_async_context(self._threads.sessions.turn(thread, tenant=self._tenant))


def _conversation_of(request) -> str | None:
    """The conversation that a request names, by its id or as an object that has one."""
    given = getattr(request, "conversation", None)
    named = given.get("id") if isinstance(given, Mapping) else given
    if given is not None and not (isinstance(named, str) and named):
        raise InvalidInput("this names no conversation", field="conversation", fix='give its id, or {"id": ...}')
    return named
