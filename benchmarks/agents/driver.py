"""Plays sessions against a system: closed loop (a number at once) or open loop (each at its arrival), and records them.

 1. Every session that is under way has a thread, which opens a conversation and takes the session's turns, with their pauses.
 2. The record of a turn says when it was asked, when tokens came, and what it cost according to the system.
 3. A turn that fails ends its session; the record says why. Nothing is tried again, since that would hide the failure.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from benchmarks.agents.workload import Session
from benchmarks.shared.small import VOCABULARY
from prefillshare.client import Client
from prefillshare.kvshare.errors import PrefillShareError, Unavailable

#: Most sessions under way in an open loop; others wait, and their waiting counts.
MOST_AT_ONCE = 256


@dataclass
class Cost:
    """What a system says about a turn's cost: prompt tokens found cached and computed at prefill, and the seconds that took;
    bytes of KV moved; how often the turn was resumed."""

    cached_tokens: int = 0
    computed_tokens: int = 0
    kv_bytes: int = 0
    resumes: int = 0
    prefill_s: float = 0.0


@dataclass
class TurnRecord:
    """All times are seconds on one clock. `token_s`: when each token came."""

    session: int
    turn: int
    agent: int
    asked_s: float
    token_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    cost: Cost = field(default_factory=Cost)
    error: str = ""

    @property
    def latency_s(self) -> float:
        return self.end_s - self.asked_s

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.asked_s

    @property
    def inter_token_s(self) -> list[float]:
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]


class Conversation(ABC):
    """One session with a system."""

    @abstractmethod
    def turn(self, agent: int, given: list[int], answer_tokens: int, arrived: Callable[[int], None]) -> Cost:
        """Take a turn. `arrived`: called with the number of tokens whenever some have come. Raises PrefillShareError."""

    @abstractmethod
    def end(self) -> None: ...


class Ours(Conversation):
    """A session of prefillshare over gRPC. `names`: the decoder of each agent."""

    def __init__(self, client: Client, names: Sequence[str], context: list[int]):
        self._names, self._session = names, client.create_session(token_ids=context)

    def turn(self, agent: int, given: list[int], answer_tokens: int, arrived: Callable[[int], None]) -> Cost:
        stream = self._session.stream(
            self._names[agent], token_ids=given, max_tokens=answer_tokens, ignore_eos=True, temperature=0.0
        )
        usage = None
        for piece in stream:
            if piece.token_ids:
                arrived(len(piece.token_ids))
            if piece.HasField("done"):
                usage = piece.done.usage
        if usage is None:
            raise PrefillShareError("the stream ended without a result")
        return Cost(
            usage.cached_tokens, usage.computed_tokens, usage.kv_bytes_transferred, usage.resumes, usage.prefill_s
        )

    def end(self) -> None:
        self._session.delete()


class Stock(Conversation):
    """A session with vLLM's own OpenAI server: the client keeps the context and sends all of it with each turn. `names`: the
    model of each agent."""

    def __init__(self, client: httpx.Client, names: Sequence[str], context: list[int]):
        self._client, self._names, self._context = client, names, list(context)

    def turn(self, agent: int, given: list[int], answer_tokens: int, arrived: Callable[[int], None]) -> Cost:
        prompt = self._context + given
        asked = {
            "model": self._names[agent], "prompt": prompt, "max_tokens": answer_tokens, "ignore_eos": True, "temperature": 0.0,
            "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True,
        }  # fmt: skip
        answer, usage = [], None
        try:
            with self._client.stream("POST", "/v1/completions", json=asked) as response:
                if response.status_code != 200:
                    raise Unavailable(response.read().decode(errors="replace"))
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    piece = json.loads(line.removeprefix("data: "))
                    usage = piece.get("usage") or usage
                    if tokens := [token for choice in piece["choices"] for token in choice.get("token_ids") or ()]:
                        arrived(len(tokens))
                        answer += tokens
        except httpx.HTTPError as error:
            raise Unavailable(f"the server broke off: {error!r}") from error
        if usage is None or len(answer) != answer_tokens:
            raise Unavailable(f"the stream ended after {len(answer)} of {answer_tokens} tokens")
        self._context = prompt + answer
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Cost(cached, len(prompt) - cached)

    def end(self) -> None:
        """The server keeps no sessions."""


def closed(
    sessions: Sequence[Session], converse: Callable[[list[int]], Conversation], at_once: int, seed: int | str,
    advance: Callable[[], None] = lambda: None,
) -> list[TurnRecord]:  # fmt: skip
    """Keep `at_once` sessions under way until none is left. `converse`: context -> a conversation."""
    texts = [session.given(VOCABULARY, seed) for session in sessions]
    with ThreadPoolExecutor(at_once) as pool:
        played = pool.map(lambda session, text: _play(session, text, converse, None, advance), sessions, texts)
        return [record for records in played for record in records]


def opened(
    sessions: Sequence[Session], converse: Callable[[list[int]], Conversation], seed: int | str,
    advance: Callable[[], None] = lambda: None,
) -> list[TurnRecord]:  # fmt: skip
    """Begin each session at its arrival, whatever has become of the others."""
    texts = [session.given(VOCABULARY, seed) for session in sessions]
    began, futures = time.monotonic(), []
    with ThreadPoolExecutor(min(MOST_AT_ONCE, len(sessions))) as pool:
        for session, text in zip(sessions, texts, strict=True):
            due = began + session.arrival_s
            time.sleep(max(0.0, due - time.monotonic()))  # arrivals wait for nothing but their time
            futures.append(pool.submit(_play, session, text, converse, due, advance))
        return [record for future in futures for record in future.result()]


def _play(
    session: Session,
    texts: tuple[list[int], list[list[int]]],
    converse: Callable[[list[int]], Conversation],
    due_s: float | None,
    advance: Callable[[], None],
) -> list[TurnRecord]:
    """Play one session. Its first turn counts as asked when the session is due (None: now), so that opening the session and
    waiting for a thread are part of the turn's latency."""
    context, given = texts
    records: list[TurnRecord] = []
    conversation = None
    try:
        for number, turn in enumerate(session.turns):
            if number:
                time.sleep(turn.pause_s)  # the tool's time
            asked_s = time.monotonic() if number or due_s is None else due_s
            record = TurnRecord(session.number, number, turn.agent, asked_s)
            records.append(record)
            try:
                conversation = conversation or converse(context)
                record.cost = conversation.turn(turn.agent, given[number], turn.answer_tokens, _noting(record.token_s))
            except PrefillShareError as error:
                record.error = type(error).__name__
            record.end_s = time.monotonic()
            advance()
            if record.error:
                break
    finally:
        if conversation:
            _end(conversation)
    return records


def _noting(times: list[float]) -> Callable[[int], None]:
    return lambda count: times.extend([time.monotonic()] * count)


def _end(conversation: Conversation) -> None:
    with suppress(PrefillShareError):  # the session expires by itself
        conversation.end()
