"""Turns on sessions: inputs become token ids, a decoder answers, the context grows.

1. Hold the session; a second turn meanwhile is refused.
2. Lay out context + input (+ suffix) as token ids; the context is not tokenised again.
3. Run the turn; text and log-probabilities come from vLLM's output processor (kvshare_vllm.surface.frontend).
4. If the turn ends well, the context becomes context + input + response, without the suffix. Of a response that a stop text has
   ended, it keeps what the client saw (router/sessions/kept_response.py). Otherwise the context stays as it was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from prefillshare.kvshare.caller import Caller
from prefillshare.kvshare.config import Base
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare.usage import TurnUsage
from prefillshare.kvshare_vllm.sampling import logprob_rows, make_prompt
from prefillshare.kvshare_vllm.surface.frontend import Frontend
from prefillshare.kvshare_vllm.surface.text_work import chars_of
from prefillshare.router.ahead.response_kv import ResponseKV
from prefillshare.router.sessions import Session, SessionStore
from prefillshare.router.sessions.chat import ChatLayout
from prefillshare.router.sessions.context_turn import ContextTurn, LaidOut
from prefillshare.router.sessions.kept_sessions import KeptSessions
from prefillshare.router.sessions.sampling import check_min_tokens, named_as_sent
from prefillshare.router.sessions.transcript import Transcript

DEFAULT_MAX_TOKENS = 256
ROLES = ("system", "user", "assistant", "tool")

#: None, ("messages", [{"role", "content"}]), ("text", str) or ("token_ids", [int]).
TurnInput = tuple[str, object] | None


@dataclass(frozen=True)
class TurnEvent:
    """New text and tokens; the last one has `finish_reason`, the context's new length, and what the turn cost."""

    text: str
    token_ids: list[int]
    logprobs: list[list[tuple[int, float, int]]] | None = None
    finish_reason: str | None = None
    context_tokens: int = 0
    usage: TurnUsage | None = None


class Turns:
    def __init__(
        self,
        base: Base,
        decoders: Mapping[str, Decoder],
        frontend: Frontend,
        sessions: SessionStore,
        response_kv: ResponseKV,
    ):
        self.decoders, self.sessions, self._response_kv = decoders, sessions, response_kv
        self.kept = KeptSessions(sessions, response_kv.keeper)
        self._frontend, self._max_len = frontend, base.max_model_len
        self._chat = ChatLayout(frontend.renderer.tokenizer)
        self._vocab_size = frontend.model_config.get_vocab_size()

    async def create(self, session_id: str, given: TurnInput, tenant: str = "", cache_domain: str = "") -> Session:
        ids = await self._ids((), False, given, answer=False, field="input")
        self._check_length(len(ids), None)
        said = Transcript().with_messages(given[1]) if given and given[0] == "messages" else None if ids else Transcript()
        return await self.sessions.create(session_id, ids, tenant=tenant, cache_domain=cache_domain, transcript=said)

    async def delete(self, session_id: str, tenant: str = "") -> None:
        self._response_kv.given_up((tenant, session_id))
        await self.sessions.delete(session_id, tenant=tenant)
        self._response_kv.gone((tenant, session_id))

    async def take(
        self,
        session_id: str,
        decoder: str,
        given: TurnInput,
        suffix: TurnInput,
        sampling,
        request_id: str,
        caller: Caller,
        deadline_s: float | None = None,
    ) -> AsyncIterator[TurnEvent]:
        if not decoder:
            raise InvalidInput("no decoder is named", field="decoder", fix=f"use one of {', '.join(self.decoders)}")
        async with self.sessions.turn(session_id, tenant=caller.tenant) as session:
            if max(session.token_ids, default=0) >= self._vocab_size:
                raise self.sessions.damaged(session_id)
            caller = caller.in_domain(session.cache_domain)
            laid_out = await self._lay_out(session, given, suffix)
            if not laid_out.seen:
                raise InvalidInput("the context is empty and the turn appends nothing", field="input", fix="append something")
            sampling.max_tokens = self._max_tokens(len(laid_out.seen), sampling.max_tokens)
            check_min_tokens(sampling.min_tokens, sampling.max_tokens)
            with named_as_sent():
                request = self._frontend.prepare(make_prompt(laid_out.seen), sampling, request_id, decoder)
            turn = ContextTurn(
                self._frontend,
                self._response_kv,
                self.decoders,
                (caller.tenant, session_id),
                caller,
                laid_out,
                keep=partial(self._keep, session, given, suffix),
                replicas=session.replicas,
                deadline_s=deadline_s,
                session=session_id,
            )
            async with aclosing(turn.outputs(request, decoder)) as outputs:
                async for output in outputs:
                    completion = output.outputs[0]
                    yield TurnEvent(
                        completion.text,
                        list(completion.token_ids),
                        logprob_rows(completion),
                        completion.finish_reason,
                        len(session.token_ids) if completion.finish_reason else 0,
                        turn.usage if completion.finish_reason else None,
                    )

    async def _keep(
        self, session: Session, given: TurnInput, suffix: TurnInput, context: list[int], text: str, token_ids: list[int]
    ) -> None:
        is_chat = (given or suffix or ("",))[0] == "messages"
        transcript = session.transcript
        if transcript and given and given[0] == "messages":
            transcript = transcript.with_messages([*given[1], {"role": "assistant", "content": text}])
        else:
            transcript = None
        await self.sessions.commit(session, context, is_chat or session.open_response, transcript)

    async def _lay_out(self, session: Session, given: TurnInput, suffix: TurnInput) -> LaidOut:
        context = list(session.token_ids)
        kept = context + await self._ids(context, session.open_response, given, answer=True, field="input")
        if suffix is None:
            return LaidOut(kept, kept)
        if suffix[0] != "messages":
            return LaidOut(kept, kept + await self._ids(kept, False, suffix, answer=True, field="suffix"))
        # The answer's opening is laid out once, after the suffix.
        before = context + await self._ids(context, session.open_response, given, answer=False, field="input")
        still_open = session.open_response and given is None
        return LaidOut(kept, before + await self._ids(before, still_open, suffix, answer=True, field="suffix"))

    async def _ids(self, context, open_response: bool, given: TurnInput, *, answer: bool, field: str) -> list[int]:
        if given is None:
            return []
        kind, value = given
        if kind == "token_ids":
            return self._checked_ids(value, f"{field}.token_ids")
        text = self._frontend.text
        chars = chars_of(value)
        text.check_chars(chars, f"{field}.{kind}")
        if kind == "text":
            return await text.run(chars, lambda: self._chat.ids(value))
        self._check_messages(value, field)
        if not context:
            return await text.run(chars, lambda: self._chat.opening(value, answer))
        return await text.run(chars, lambda: self._chat.appended(context, open_response, value, answer))

    def _checked_ids(self, given: list[int], field: str) -> list[int]:
        if len(given) > self._max_len:
            raise InvalidInput(
                f"{len(given)} token ids are more than the model's length of {self._max_len}",
                field=field,
                fix="send fewer, or raise base.max_model_len",
            )
        for position, token in enumerate(given):
            if not 0 <= token < self._vocab_size:
                raise InvalidInput(
                    f"token id {token} at position {position} is out of range",
                    field=field,
                    fix=f"use ids from 0 to {self._vocab_size - 1}",
                )
        return list(given)

    def _check_messages(self, messages, field: str) -> None:
        if not messages:
            raise InvalidInput("no message is given", field=f"{field}.messages", fix="give at least one, or leave it out")
        for number, message in enumerate(messages):
            if message["role"] not in ROLES:
                raise InvalidInput(
                    f"unknown role {message['role']!r}",
                    field=f"{field}.messages.{number}.role",
                    fix=f"use one of {', '.join(ROLES)}",
                )

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
