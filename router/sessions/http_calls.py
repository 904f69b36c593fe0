"""Chat-like HTTP calls (OpenAI's chat completions and responses, Anthropic's messages), each tied to a context.

A call names a session, or none:
 - Without a session its prompt is laid out as the chat template does. The base's KV of its answer is made ahead all the same
   (router/ahead): the next call, whose messages begin with this call's and the answer, finds it by its tokens.
 - With a session, whatever of its messages the session holds already is neither laid out nor tokenised again: the prompt is the
   session's token ids and what is new. If the messages do not begin with those of the session, the call is served as if it
   named none, and the session stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress

from prefillshare.kvshare.caller import Caller, current_caller
from prefillshare.kvshare.config import Base
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import Conflict, InvalidInput, NotFound, PrefillShareError
from prefillshare.kvshare_vllm.surface.frontend import Frontend
from prefillshare.kvshare_vllm.surface.http_turn import Conversation, asked, message_of
from prefillshare.kvshare_vllm.surface.run import USAGE
from prefillshare.kvshare_vllm.surface.text_work import chars_of
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.sessions.agent_layout import AgentLayout, apart, as_message
from prefillshare.router.sessions.base import OwnPart, Session, SessionStore
from prefillshare.router.sessions.context_turn import ContextTurn, LaidOut, check_stays_whole
from prefillshare.router.sessions.kept_prompt import Beginning, KeptPrompt, retention_s
from prefillshare.router.sessions.open_contexts import OpenContexts
from prefillshare.router.sessions.transcript import Transcript

logger = logging.getLogger(__name__)

Plain = Callable[[], Awaitable[str | list[int]]]


class HttpCalls:
    """What all of a router's calls have in common. `own_prompt`: as config.Router.own_prompt."""

    def __init__(
        self,
        base: Base,
        decoders: Mapping[str, Decoder],
        frontend: Frontend,
        sessions: SessionStore,
        response_kv: ResponseKV,
        own_prompt: str = "behind",
    ):
        self.decoders, self.frontend, self.sessions, self.response_kv = decoders, frontend, sessions, response_kv
        self.contexts, self.max_len = OpenContexts(base.block_size), base.max_model_len
        self.own_first = own_prompt == "first"
        self.vocab_size = frontend.model_config.get_vocab_size()

    def without_session(self) -> OpenCall:
        return OpenCall(self)

    def on_session(self, session_id: str, stack: AsyncExitStack) -> SessionCall:
        """The call holds its session until `stack` is closed. A session that does not exist begins with this call, if that ends
        well."""
        return SessionCall(self, session_id, stack)


class OpenCall:
    """A call that names no session."""

    state = ""

    def __init__(self, calls: HttpCalls, kept: KeptPrompt | None = None):
        self._calls, self._kept = calls, kept or KeptPrompt(calls.response_kv.keeper)

    def keep_up_to(self, beginnings: Sequence[Beginning]) -> None:
        self._kept.beginnings = beginnings

    async def lay_out(self, conversation: Conversation, plain: Plain) -> str | list[int]:
        retention_s(asked())
        return await plain()

    async def outputs(self, request, decoder: str, caller: Caller, prompt_text: str | None) -> AsyncIterator:
        calls, prompt, params = self._calls, list(request.prompt_token_ids), request.sampling_params
        how = {"prompt_text": prompt_text, "keep": self._kept.of(caller, prompt, request.cache_salt, asked())}
        if params.n > 1 or params.max_tokens == 1:  # no single answer to go on from, or (beam search) a piece of one
            running = calls.frontend.run(request, decoder, caller, **how).outputs()
        else:
            context = calls.contexts.of(prompt, caller, request.cache_salt)

            async def went_on(token_ids: list[int], *_) -> None:
                calls.contexts.went_on(context, token_ids, caller, request.cache_salt)

            running = ContextTurn(
                calls.frontend,
                calls.response_kv,
                calls.decoders,
                (caller.tenant, context.name),
                caller,
                LaidOut(prompt, prompt),
                went_on,
                context.replicas,
            ).outputs(request, decoder, **how)
        async with aclosing(running) as outputs:
            async for output in outputs:
                yield output


class SessionCall:
    """A call that names a session. `state`: how it is served: "begun", "continued", or "as it is: " and the reason."""

    def __init__(self, calls: HttpCalls, session_id: str, stack: AsyncExitStack):
        self._calls, self._session_id, self._stack = calls, session_id, stack
        self._kept = KeptPrompt(calls.response_kv.keeper)
        self.state = ""
        self._session: Session | None = None
        self._laid_out: LaidOut | None = None
        self._own: OwnPart | None = None
        self._is_kept = False
        #: What the context will say when the answer comes behind it.
        self._transcript: Transcript | None = None

    def keep_up_to(self, beginnings: Sequence[Beginning]) -> None:
        self._kept.beginnings = beginnings

    async def lay_out(self, conversation: Conversation, plain: Plain) -> str | list[int]:
        self._check_asked()
        retention_s(asked())
        reason = "the last message is to be continued" if conversation.continues else await self._hold()
        if not reason:
            reason = await self._continue(conversation)
        if reason:
            self.state = f"as it is: {reason}"
            return await plain()
        self.state = "continued" if self._session.turns or self._session.token_ids else "begun"
        return self._laid_out.seen

    async def outputs(self, request, decoder: str, caller: Caller, prompt_text: str | None) -> AsyncIterator:
        calls, session = self._calls, self._session
        if self._laid_out is None:
            running = OpenCall(calls, self._kept).outputs(request, decoder, caller, prompt_text)
        else:
            caller = caller.in_domain(session.cache_domain)
            keep = self._kept.of(caller, self._laid_out.context, request.cache_salt, asked(), whole=True)
            running = ContextTurn(
                calls.frontend,
                calls.response_kv,
                calls.decoders,
                (caller.tenant, self._session_id),
                caller,
                self._laid_out,
                self._commit,
                session.replicas,
                session=self._session_id,
            ).outputs(request, decoder, prompt_text=prompt_text, keep=keep)
        async with aclosing(running) as outputs:
            async for output in outputs:
                if usage := (output.kv_transfer_params or {}).get(USAGE):
                    usage["session"] = self.state
                yield output

    def _check_asked(self) -> None:
        request = asked()
        for field, one in (("n", 1), ("use_beam_search", False)):
            if (getattr(request, field, None) or one) != one:
                raise InvalidInput(
                    "a session goes on from one answer", field=field, fix="leave it out, or call without a session"
                )
        if getattr(request, "truncate_prompt_tokens", None) is not None:
            raise InvalidInput(
                "a session goes on from all that was said in it",
                field="truncate_prompt_tokens",
                fix="leave it out, or call without a session; UpdateSession truncates a session",
            )

    async def _hold(self) -> str:
        """Returns why it cannot be held, "" if it is."""
        calls, caller = self._calls, current_caller.get()
        try:
            await calls.sessions.get(self._session_id, tenant=caller.tenant)
        except NotFound:
            with suppress(Conflict):  # another call has begun it
                await calls.sessions.create(
                    self._session_id, tenant=caller.tenant, cache_domain=caller.cache_domain, transcript=Transcript()
                )
                self._stack.push_async_callback(self._tidy, caller.tenant)
                await calls.response_kv.gone((caller.tenant, self._session_id))  # kept of a session before it
        try:
            held = calls.sessions.turn(self._session_id, tenant=caller.tenant)
            session = await self._stack.enter_async_context(held)
        except Conflict:
            return "another turn runs on the session"
        if max(session.token_ids, default=0) >= calls.vocab_size:
            raise calls.sessions.damaged(self._session_id)
        self._session = session
        return ""

    async def _tidy(self, tenant: str) -> None:
        """Delete the session that this call has begun, if no call has gone on in it."""
        if self._is_kept:
            return
        sessions = self._calls.sessions
        try:
            async with sessions.turn(self._session_id, tenant=tenant) as session:
                if not session.turns and not session.token_ids:
                    await sessions.delete(self._session_id, tenant=tenant)
                    await self._calls.response_kv.gone((tenant, self._session_id))
        except (NotFound, Conflict):  # it is gone, or another call goes on in it
            pass
        except PrefillShareError as error:
            logger.warning("session %r stays until its time has passed: %s", self._session_id, error)

    async def _continue(self, conversation: Conversation) -> str:
        """Lay out what is new behind the session's context. Returns why that cannot be done, "" if it is."""
        session, calls = self._session, self._calls
        said = session.transcript
        if said is None:
            return "the session does not consist of chat messages only"
        tools, first = conversation.tools, None
        own, messages = apart(conversation.messages)
        if calls.own_first:
            first = tools if not session.token_ids else None
            own, messages, tools = (), [*as_message(tools), *conversation.messages], None
        elif said.count and not said.begins(messages) and said.begins(conversation.messages):
            own, messages = (), conversation.messages  # the session began with these system messages
        if not said.begins(messages):
            return f"its messages do not begin with the {said.count} of the session"
        if not messages:
            return "it has no message of the conversation"
        new = messages[said.count :]  # none where another agent goes on from the answer, as the nodes of a graph do
        layout = AgentLayout(calls.frontend.renderer.tokenizer, conversation.render, first)
        shown = [message for message in new if message["role"] != "tools"]
        chars = chars_of(shown) + chars_of(own) + chars_of(tools)
        calls.frontend.text.check_chars(chars, "messages")
        self._laid_out, self._own = await calls.frontend.text.run(
            chars, lambda: layout.behind(session, shown, own, tools)
        )
        check_stays_whole(asked(), self._laid_out, calls.max_len)
        self._transcript = said.with_messages(new)
        return ""

    async def _commit(self, context: list[int], text: str, token_ids: Sequence[int]) -> bool:
        message = message_of(text, token_ids)
        said = self._transcript.with_messages([message])
        await self._calls.sessions.commit(self._session, context, True, said, own=self._own)
        self._is_kept = True
        return "tool_calls" in message
