"""A call that makes a response: the next turn of a thread, whichever decoder made the turn before.

1. `begin`: find what the response goes on from: an earlier response, a conversation, or nothing.
2. `lay_out`: hold that thread, or a fork of it, and lay out what is new behind its token ids.
3. `outputs`: run the turn, as every turn on a context.
4. `finish`: store response, items and context in one step, then the client is told.

A call that sends the whole history (as agent frameworks do) goes on from the response with which the longest known part of it
ends. If nothing is known of it, or the store does not answer, it is served as it is. A call that fails changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from prefillshare.kvshare.caller import Caller, current_caller
from prefillshare.kvshare.errors import Conflict, InvalidInput, Unavailable
from prefillshare.kvshare_vllm.surface.http_turn import Conversation, message_of
from prefillshare.kvshare_vllm.surface.run import USAGE
from prefillshare.kvshare_vllm.surface.text_work import chars_of
from prefillshare.router.responses.context import ResponseContext
from prefillshare.router.responses.conversations import checked_metadata
from prefillshare.router.responses.items import items_of, unanswered
from prefillshare.router.responses.threads import StoredResponse, Threads, damaged, new_response, told_of
from prefillshare.router.sessions.agent_layout import AgentLayout, as_message
from prefillshare.router.sessions.base import Mark, OwnPart, Session
from prefillshare.router.sessions.context_turn import ContextTurn, LaidOut, check_stays_whole
from prefillshare.router.sessions.http_calls import HttpCalls, OpenCall, Plain
from prefillshare.router.sessions.kept_prompt import KeptPrompt, retention_s
from prefillshare.router.sessions.transcript import Transcript

logger = logging.getLogger(__name__)


class ResponseCall:
    """`stack`: closed when the call has ended; then nothing is held any more. `state`: as of SessionCall."""

    def __init__(self, calls: HttpCalls, threads: Threads, stack: AsyncExitStack):
        self._calls, self._threads = calls, threads
        self._tenant = current_caller.get().tenant
        self._kept_prompt = KeptPrompt(calls.response_kv.keeper)
        self.state = ""
        self._context = ResponseContext(threads, stack)
        self._session: Session | None = None
        self._laid_out: LaidOut | None = None
        self._transcript: Transcript | None = None
        self._own: OwnPart | None = None
        #: The context with the response, and the response as a message.
        self._kept: tuple[list[int], dict[str, Any]] | None = None

    async def begin(self, request) -> None:
        retention_s(request)
        self._request, self._stores = request, request.store is not False
        #: Whether the client relies on the store; else it is served without it, too.
        self._needs_store = "store" in request.model_fields_set and request.store is True
        self._shown = {"previous_response_id": request.previous_response_id, "store": self._stores, "conversation": None}
        checked_metadata(request.metadata)
        self._items = items_of(request.input, "input")
        await self._context.find(request, self._items)
        if conversation := self._context.conversation:
            self._shown["conversation"] = {"id": conversation.thread}
        # vLLM neither finds nor keeps responses.
        request.previous_response_id, request.store = None, False

    async def lay_out(self, conversation: Conversation, plain: Plain) -> str | list[int]:
        if conversation.continues:
            if self._context.is_named:
                raise InvalidInput(
                    "a message that is to be continued goes on from no stored response",
                    field="input",
                    fix="send the whole history, or a message with status completed",
                )
            return await self._as_it_is("the last message is to be continued", plain)
        said, own = conversation.messages, ()
        tools, first = conversation.tools, None
        if self._request.instructions:
            own, said = said[:1], said[1:]
        if self._calls.own_first:
            own, said, tools, first = (), [*as_message(tools), *own, *said], None, tools
        try:
            session, said = await self._context.begin(said, stores=self._stores)
        except Unavailable as error:
            if self._context.is_named or self._needs_store:
                raise
            logger.warning("a response is made without the store: %s", error)
            return await self._as_it_is("the store of responses does not answer", plain)
        self._session = session
        if max(session.token_ids, default=0) >= self._calls.vocab_size:
            raise damaged(*self._context.told)
        new = [message for message in said if message["role"] != "tools"]
        layout = AgentLayout(self._calls.frontend.renderer.tokenizer, conversation.render, None if session.token_ids else first)
        text, chars = self._calls.frontend.text, chars_of(new) + chars_of(own) + chars_of(tools)
        text.check_chars(chars, "input")
        self._laid_out, self._own = await text.run(chars, lambda: layout.behind(session, new, own, tools))
        check_stays_whole(self._request, self._laid_out, self._calls.max_len)
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
            keep = self._kept_prompt.of(caller, prompt, request.cache_salt, self._request)
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
            ).outputs(request, decoder, prompt_text=prompt_text, keep=keep)
        async with aclosing(running) as outputs:
            async for output in outputs:
                if usage := (output.kv_transfer_params or {}).get(USAGE):
                    usage["session"] = self.state
                yield output

    def dress(self, response) -> None:
        for name, value in self._shown.items():
            setattr(response, name, value)

    async def finish(self, response) -> None:
        if not self._stores or self._kept is None:
            return
        context, message = self._kept
        said = self._transcript.with_messages([message])
        body = response.model_dump(mode="json", by_alias=True)
        left = unanswered(self._context.unanswered, [item for item in body["output"] if "call_id" in item], "output")
        stored = StoredResponse(self._session.session_id, body, self._items, Mark(len(context), True, said, self._own), left)
        conversation = self._context.conversation
        notes = conversation.grown([*self._items, *body["output"]], left) if conversation else {}
        try:
            with told_of(*self._context.told):
                await self._threads.keep(self._session, context, stored, notes)
        except (Unavailable, Conflict) as error:
            if self._context.is_named or self._needs_store:
                raise
            logger.warning("response %s is not stored: %s", body["id"], error)
            self._shown["store"] = False
            self.dress(response)
        else:
            self._context.is_kept = True

    async def _keep(self, context: list[int], text: str, token_ids: list[int]) -> bool:
        message = message_of(text, token_ids)
        self._kept = context, message
        return "tool_calls" in message

    async def _as_it_is(self, reason: str, plain: Plain) -> str | list[int]:
        self._stores = self._shown["store"] = False
        self.state = f"as it is: {reason}"
        return await plain()
