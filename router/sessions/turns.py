"""Turns on sessions: inputs become token ids, a decoder answers, the context grows.

1. Hold the session; a second turn meanwhile is refused. Where several responses are asked for, it is only read.
2. Lay out context + input (+ the decoder's own part) as token ids (router/sessions/turn_inputs.py).
3. Run the turn; text and log-probabilities come from vLLM's output processor (kvshare_vllm.surface.frontend), tool calls from
   vLLM's parsers (kvshare_vllm.surface.chats).
4. If the turn ends well, the context becomes context + input + response, without the decoder's own part. Of a response that a
   stop text has ended, it keeps what the client saw (router/sessions/seen_response.py). Otherwise, and where there are several
   responses, the context stays as it was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial

from prefillshare.kvshare.caller import Caller, cache_salt
from prefillshare.kvshare.config import Base
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import Conflict, InvalidInput
from prefillshare.kvshare_vllm.sampling import SamplingParams, make_prompt
from prefillshare.kvshare_vllm.surface.chats import Answer, AskedTools
from prefillshare.kvshare_vllm.surface.frontend import Frontend
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.sessions.base import Session, SessionStore
from prefillshare.router.sessions.context_turn import ContextTurn
from prefillshare.router.sessions.kept_sessions import KeptSessions
from prefillshare.router.sessions.sampling import check_min_tokens, named_as_sent
from prefillshare.router.sessions.turn_inputs import TurnInput, TurnInputs
from prefillshare.router.sessions.turn_responses import Responses, TurnEvent
from prefillshare.router.sessions.unanswered import left_unanswered
from prefillshare.router.turn.terms import Terms

DEFAULT_MAX_TOKENS = 256


class Turns:
    """`own_prompt`: as config.Router.own_prompt. `longest_ttl_s`: most seconds that a client may have a session live unused."""

    def __init__(
        self,
        base: Base,
        decoders: Mapping[str, Decoder],
        frontend: Frontend,
        sessions: SessionStore,
        response_kv: ResponseKV,
        own_prompt: str = "behind",
        longest_ttl_s: float | None = None,
    ):
        self.decoders, self.sessions, self._response_kv = decoders, sessions, response_kv
        self.kept = KeptSessions(sessions, response_kv.keeper)
        self._frontend, self._max_len, self._longest_ttl_s = frontend, base.max_model_len, longest_ttl_s
        self._inputs = TurnInputs(base, frontend, own_prompt == "first")

    def asked_tools(self, fields: Mapping[str, object], max_tokens: int | None) -> AskedTools:
        """As of Chats."""
        return self._frontend.chats.asked_tools(fields, max_tokens)

    async def create(
        self, session_id: str, given: TurnInput, tenant: str = "", cache_domain: str = "", ttl_s: float | None = None
    ) -> Session:
        begun = await self._inputs.beginning(given)
        self._check_length(len(begun.token_ids), None)
        said = {"transcript": begun.transcript, "unanswered": begun.unanswered, "ttl_s": self._own_ttl_s(ttl_s)}
        session = await self.sessions.create(session_id, begun.token_ids, tenant=tenant, cache_domain=cache_domain, **said)
        await self._response_kv.gone((tenant, session_id))  # what is kept under the name is of a session before it
        return session

    async def fork(self, session_id: str, new_session_id: str, tenant: str = "") -> Session:
        fork = await self.sessions.fork(session_id, new_session_id, tenant=tenant)
        await self._response_kv.gone((tenant, new_session_id))  # as for `create`
        return fork

    async def delete(self, session_id: str, tenant: str = "") -> None:
        self._response_kv.given_up((tenant, session_id))
        await self.sessions.delete(session_id, tenant=tenant)
        await self._response_kv.gone((tenant, session_id))

    async def update(
        self, session_id: str, tenant: str = "", *, truncate_to: int | None = None, ttl_s: float | None = None
    ) -> Session:
        """`ttl_s`: 0 stands for that of other sessions. Raises as the store does, and InvalidInput."""
        if truncate_to is None and ttl_s is None:
            raise InvalidInput("nothing is to be changed", field="truncate_to", fix="set truncate_to, ttl_s, or both")
        own_ttl_s = self._own_ttl_s(ttl_s)
        if truncate_to is not None:
            await self._truncate(session_id, tenant, truncate_to)
        if ttl_s is None:
            return await self.sessions.get(session_id, tenant=tenant)
        session = await self.sessions.set_ttl(session_id, own_ttl_s, tenant=tenant)
        await self.kept.live_for(session)
        return session

    async def take(
        self,
        session_id: str,
        decoder: str,
        given: TurnInput,
        suffix: TurnInput,
        sampling: SamplingParams,
        request_id: str,
        caller: Caller,
        deadline_s: float | None = None,
        *,
        tools: AskedTools | None = None,
        expected_turns: int | None = None,
    ) -> AsyncIterator[TurnEvent]:
        """`sampling`: vLLM's; with tools, that of `tools`."""
        if not decoder:
            raise InvalidInput("no decoder is named", field="decoder", fix=f"use one of {', '.join(self.decoders)}")
        self._check_numbers(sampling)
        held = self._read if sampling.n > 1 else self.sessions.turn
        async with held(session_id, tenant=caller.tenant) as session:
            _check_turns(session, expected_turns)
            if max(session.token_ids, default=0) >= self._inputs.vocab_size:
                raise self.sessions.damaged(session_id)
            caller = caller.in_domain(session.cache_domain)
            begun = await self._inputs.lay_out(session, given, suffix, tools.definitions if tools else None)
            seen = begun.laid_out.seen
            if not seen:
                raise InvalidInput("the context is empty and the turn appends nothing", field="input", fix="append something")
            sampling.max_tokens = self._max_tokens(len(seen), sampling.max_tokens)
            check_min_tokens(sampling.min_tokens, sampling.max_tokens)
            with named_as_sent():
                request = self._frontend.prepare(make_prompt(seen), sampling, request_id, decoder)
            answers = [tools.answer() if tools else Answer() for _ in range(sampling.n)]
            responses = Responses(session, begun, answers, has_ranks=not sampling.logprob_token_ids)
            if sampling.n > 1:
                terms = Terms(deadline_s, dict(session.replicas), session=session_id)
                run = self._frontend.run(request, decoder, caller, terms=terms)
                outputs, usages = responses.all_read(run.outputs()), lambda: [turn.usage for turn in run.turns]
            else:
                turn = ContextTurn(
                    self._frontend,
                    self._response_kv,
                    self.decoders,
                    (caller.tenant, session_id),
                    caller,
                    begun.laid_out,
                    partial(self._commit, responses),
                    session.replicas,
                    deadline_s,
                    responses.read,
                    session_id,
                )
                outputs, usages = turn.outputs(request, decoder), lambda: [turn.usage]
            with named_as_sent(None):
                async with aclosing(outputs):
                    async for _ in outputs:
                        for event in responses.events(usages()):
                            yield event

    async def _commit(self, responses: Responses, context: list[int], text: str, token_ids: list[int]) -> bool:
        session, begun, answer = responses.session, responses.begun, responses.answers[0]
        said = begun.transcript and begun.transcript.with_messages([answer.message])
        is_open, waiting = begun.opened or session.open_response, left_unanswered(begun.unanswered, [answer.message])
        await self.sessions.commit(session, context, is_open, said, own=begun.own, unanswered=waiting)
        return bool(answer.calls) and begun.own is not None

    @asynccontextmanager
    async def _read(self, session_id: str, *, tenant: str) -> AsyncIterator[Session]:
        """For a turn that changes nothing: others may run meanwhile."""
        yield await self.sessions.get(session_id, tenant=tenant)

    async def _truncate(self, session_id: str, tenant: str, tokens: int) -> None:
        async with self.sessions.turn(session_id, tenant=tenant) as session:
            held = len(session.token_ids)
            if not 0 <= tokens <= held:
                raise InvalidInput(
                    f"{tokens} is out of range: the context has {held} tokens", field="truncate_to", fix=f"use 0 to {held}"
                )
            if tokens == held:
                return
            is_open = not self._inputs.is_closed(session, tokens)
            said = await self.sessions.said_at(session, tokens)
            own = session.own if session.own and session.own.tokens <= tokens else None
            await self.sessions.commit(session, session.token_ids[:tokens], is_open, said, own=own, is_turn=False)
        salt = cache_salt(session.cache_domain)
        self._response_kv.shortened((tenant, session_id), list(session.token_ids), salt)

    def _own_ttl_s(self, asked: float | None) -> float | None:
        """The time to live that a session gets; None: the store's."""
        if not asked:
            return None
        longest = self.sessions.ttl_s if self._longest_ttl_s is None else self._longest_ttl_s
        if not 0 < asked <= longest:
            raise InvalidInput(
                f"{asked:g} s is out of range",
                field="ttl_s",
                fix=f"use a value in (0, {longest:g}], or 0 for that of other sessions; router.max_session_ttl_s bounds it",
            )
        return asked

    def _check_numbers(self, sampling: SamplingParams) -> None:
        most = max(self._inputs.vocab_size, self._max_len)
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            if len(ids := getattr(sampling, name) or ()) > most:
                raise InvalidInput(f"{len(ids)} token ids", field=f"sampling.{name}", fix=f"give at most {most}")

    def _max_tokens(self, prompt_tokens: int, asked: int | None) -> int:
        self._check_length(prompt_tokens, asked)
        return asked or min(DEFAULT_MAX_TOKENS, self._max_len - prompt_tokens)

    def _check_length(self, prompt_tokens: int, asked: int | None) -> None:
        if prompt_tokens >= self._max_len:
            raise InvalidInput(
                f"{prompt_tokens} prompt tokens leave no room for a response: the model takes {self._max_len}, both together",
                field="input",
                fix="send less, start a new session, or raise base.max_model_len",
            )
        if asked is not None and prompt_tokens + asked > self._max_len:
            raise InvalidInput(
                f"{asked} tokens do not fit behind the prompt's {prompt_tokens}: the model takes {self._max_len}",
                field="sampling.max_tokens",
                fix=f"ask for at most {self._max_len - prompt_tokens}, start a new session, or raise base.max_model_len",
            )


def _check_turns(session: Session, expected: int | None) -> None:
    if expected is not None and session.turns != expected:
        raise Conflict(
            f"session {session.session_id!r} has had {session.turns} turns, not {expected}",
            field="expected_turns",
            fix="look at the session before taking the turn again",
        )
