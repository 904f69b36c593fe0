"""A call that makes a response: the next turn of a thread, whichever decoder made the turn before.

1. `begin`: find what the response goes on from: an earlier response, a conversation, or nothing.
2. `lay_out`: hold that thread, or a fork of it, and lay out what is new behind its token ids.
3. `outputs`: run the turn, as every turn on a context.
4. `finish`: store response, items and context in one step, then the client is told.

A call that sends the whole history (as agent frameworks do) goes on from the response with which the longest known part of it
ends. A call that fails changes nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any

from prefillshare.kvshare.caller import Caller, current_caller
from prefillshare.kvshare.errors import Conflict, InvalidInput, NotFound
from prefillshare.kvshare_vllm.surface.http_turn import Conversation, message_of
from prefillshare.kvshare_vllm.surface.run import USAGE
from prefillshare.kvshare_vllm.surface.text_work import chars_of
from prefillshare.router.responses.conversations import ConversationNotes
from prefillshare.router.responses.items import items_of, unanswered
from prefillshare.router.responses.threads import StoredResponse, Threads, new_response, new_thread
from prefillshare.router.sessions.agent_layout import AgentLayout, as_message
from prefillshare.router.sessions.base import Mark, OwnPart, Session
from prefillshare.router.sessions.context_turn import ContextTurn, LaidOut
from prefillshare.router.sessions.http_calls import HttpCalls, OpenCall, Plain
from prefillshare.router.sessions.kept_prompt import KeptPrompt, retention_s
from prefillshare.router.sessions.transcript import Transcript


class ResponseCall:
    """`stack`: closed when the call has ended; then nothing is held any more. `state`: as of SessionCall."""

    def __init__(self, calls: HttpCalls, threads: Threads, stack: AsyncExitStack):
        self._calls, self._threads, self._stack = calls, threads, stack
        self._tenant = current_caller.get().tenant
        self._kept_prompt = KeptPrompt(calls.response_kv.keeper)
        self.state = ""
        self._previous: StoredResponse | None = None
        self._conversation: ConversationNotes | None = None
        self._unanswered: list[str] = []
        self._session: Session | None = None
        self._laid_out: LaidOut | None = None
        self._transcript: Transcript | None = None
        self._own: OwnPart | None = None
        #: The context with the response, and the response as a message.
        self._kept: tuple[list[int], dict[str, Any]] | None = None
        self._finished = False

    async def begin(self, request) -> None:
        retention_s(request)
        self._request, self._stores = request, request.store is not False
        self._shown = {"previous_response_id": request.previous_response_id, "store": self._stores, "conversation": None}
        named = _conversation_of(request)
        if request.background:
            raise InvalidInput("responses are made while their clients wait", field="background", fix="leave it out, or stream")
        if named and request.previous_response_id:
            raise InvalidInput("a response goes on from one or the other", field="conversation", fix="leave one of them out")
        self._items = items_of(request.input)
        before: Sequence[str] = ()
        if request.previous_response_id:
            self._previous = await self._threads.response(request.previous_response_id, self._tenant, "previous_response_id")
            before = self._previous.unanswered
        if named:
            self._shown["conversation"] = {"id": named}
            self._conversation = await ConversationNotes.of(self._threads, named, self._tenant, "conversation")
            before = self._conversation.unanswered
        self._unanswered = unanswered(before, self._items, "input")
        # vLLM neither finds nor keeps responses.
        request.previous_response_id, request.store = None, False

    async def lay_out(self, conversation: Conversation, plain: Plain) -> str | list[int]:
        if conversation.continues:
            return await self._as_it_is("the last message is to be continued", plain)
        said, own = conversation.messages, ()
        tools, first = conversation.tools, None
        if self._request.instructions:
            own, said = said[:1], said[1:]
        if self._calls.own_first:
            own, said, tools, first = (), [*as_message(tools), *own, *said], None, tools
        if not self._previous and not self._conversation and (found := await self._threads.found(said, self._tenant)):
            self._previous, said = found, said[found.mark.transcript.count :]
        session = self._session = await self._context()
        if max(session.token_ids, default=0) >= self._calls.vocab_size:
            raise self._threads.sessions.damaged(session.session_id)
        new = [message for message in said if message["role"] != "tools"]
        layout = AgentLayout(self._calls.frontend.renderer.tokenizer, conversation.render, None if session.token_ids else first)
        text, chars = self._calls.frontend.text, chars_of(new) + chars_of(own) + chars_of(tools)
        text.check_chars(chars, "input")
        self._laid_out, self._own = await text.run(chars, lambda: layout.behind(session, new, own, tools))
        self._transcript = (session.transcript or Transcript()).with_messages(said)
        if self._stores:
            self._request.request_id = new_response(session.session_id)
        self.state = "continued" if session.token_ids else "begun"
        return self._laid_out.seen

    async def outputs(self, request, decoder: str, caller: Caller, prompt_text: str | None) -> AsyncIterator:
        calls, session = self._calls, self._session
        if self._laid_out is None:
            running = OpenCall(calls).outputs(request, decoder, caller, prompt_text)
        else:
            caller, prompt = caller.in_domain(session.cache_domain), self._laid_out.context
            kept_tokens = await self._kept_prompt.grant(caller, prompt, request.cache_salt, self._request)
            running = ContextTurn(
                calls.frontend,
                calls.response_kv,
                calls.decoders,
                (self._tenant, session.session_id or request.request_id),
                caller,
                self._laid_out,
                self._keep,
                session.replicas,
                session=session.session_id,
            ).outputs(request, decoder, prompt_text=prompt_text, kept_tokens=kept_tokens)
        async with aclosing(running) as outputs:
            async for output in outputs:
                self._kept_prompt.there()
                if usage := (output.kv_transfer_params or {}).get(USAGE):
                    usage["session"] = self.state
                yield output

    def dress(self, response) -> None:
        for name, value in self._shown.items():
            setattr(response, name, value)

    async def finish(self, response) -> None:
        self._finished = True
        if not self._stores or self._kept is None:
            return
        context, message = self._kept
        said = self._transcript.with_messages([message])
        body = response.model_dump(mode="json", by_alias=True)
        left = unanswered(self._unanswered, [item for item in body["output"] if "call_id" in item], "output")
        stored = StoredResponse(self._session.session_id, body, self._items, Mark(len(context), True, said, self._own), left)
        notes = self._conversation.grown([*self._items, *body["output"]], left) if self._conversation else {}
        await self._threads.keep(self._session, context, stored, notes)

    async def _keep(self, context: list[int], text: str, token_ids: list[int]) -> bool:
        message = message_of(text, token_ids)
        self._kept = context, message
        return "tool_calls" in message

    async def _as_it_is(self, reason: str, plain: Plain) -> str | list[int]:
        if self._stores and (self._previous or self._conversation):
            raise InvalidInput(f"{reason}, which no stored response can be", field="input", fix="set store to false")
        self._stores = self._shown["store"] = False
        self.state = f"as it is: {reason}"
        return await plain()

    async def _context(self) -> Session:
        """The context that the response goes on from; held if the response is to be stored."""
        sessions, caller = self._threads.sessions, current_caller.get()
        if self._conversation:
            if not self._stores:
                return await sessions.get(self._conversation.thread, tenant=self._tenant)
            return await self._held(self._conversation.thread)
        if self._previous:
            return await self._behind(self._previous)
        if not self._stores:
            return Session("", self._tenant, cache_domain=caller.cache_domain)
        thread = await sessions.create(
            new_thread(), tenant=self._tenant, cache_domain=caller.cache_domain, transcript=Transcript()
        )
        return await self._held_anew(thread.session_id)

    async def _behind(self, previous: StoredResponse) -> Session:
        sessions, thread, mark = self._threads.sessions, previous.thread, previous.mark
        if not self._stores:
            return (await sessions.get(thread, tenant=self._tenant)).at(mark)
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
            if not self._finished:
                with suppress(NotFound):
                    await self._threads.sessions.delete(thread, tenant=self._tenant)

        self._stack.push_async_callback(tidy)
        return await self._held(thread)

    async def _held(self, thread: str) -> Session:
        return await self._stack.enter_async_context(self._threads.sessions.turn(thread, tenant=self._tenant))


def _conversation_of(request) -> str | None:
    """The conversation that a request names, by its id or as an object that has one."""
    given = getattr(request, "conversation", None)
    named = given.get("id") if isinstance(given, Mapping) else given
    if named is not None and not isinstance(named, str):
        raise InvalidInput("this names no conversation", field="conversation", fix='give its id, or {"id": ...}')
    return named or None
