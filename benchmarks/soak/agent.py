"""One client of the campaign: what it asks for, and what it may be told. It knows the history of each of its sessions."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.faults.hang_ups import hang_up
from benchmarks.shared.small import VOCABULARY
from benchmarks.soak.findings import Findings
from benchmarks.soak.http_agent import HttpAgent, Refused
from benchmarks.soak.system import COMES_AND_GOES, DECODERS, HELD_S, MOST_TOKENS, OWN_LAYERS, System
from benchmarks.soak.truth import Truth, compare
from prefillshare.client import Client, RemoteSession, collect
from prefillshare.kvshare.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    PrefillShareError,
    SessionBusy,
    Unavailable,
)

#: Errors that a client may be told while everything fails: the turn has changed nothing.
MAY_FAIL = (Unavailable, DeadlineExceeded, Overloaded)
SESSIONS_EACH = 4
#: A context of this length is given up; with a turn's tokens it still fits the model.
LONGEST = MOST_TOKENS - 300
DEADLINE_S, SHORT_S = 60.0, (0.02, 1.5)
#: Seconds beyond its deadline after which a turn hangs, and for which a session may be unknown after a fault.
LATE_S, SETTLE_S = 15.0, 120.0
#: Of the sampled turns that were answered, the share that is asked again when all is quiet.
AGAIN = 0.2


@dataclass(frozen=True)
class Again:
    """A turn to ask again: its tokens must be the same."""

    decoder: str
    prompt: list[int]
    sampling: dict
    tokens: list[int]


class Agent:
    """`more()`: whether it is to go on."""

    def __init__(
        self, number: int, rng: random.Random, system: System, truth: Truth, found: Findings, more: Callable[[], bool]
    ):
        self._number, self._rng, self._truth, self._found, self._more = number, rng, truth, found, more
        self._url = system.http_url
        self._client = Client(system.grpc_address, timeout_s=DEADLINE_S)
        self._http = HttpAgent(system.http_url, rng, truth, found)
        #: Session -> its context, as it must be.
        self.contexts: dict[str, list[int]] = {}
        #: Session of which a turn was cut off -> when: it may be held until the server has noticed.
        self._cut_off: dict[str, float] = {}
        self.again: list[Again] = []

    def run(self) -> None:
        acts: dict[Callable[[], None], int] = {
            self._take: 45, self._begin: 8, self._fork: 5, self._give_up: 4, self._truncate: 3, self._keep: 3,
            self._two_at_once: 4, self._unknown: 2, self._hang_up: 3, self._over_http: 20,
        }  # fmt: skip
        while self._more():
            act = self._begin if not self.contexts else self._rng.choices(list(acts), acts.values())[0]
            began = time.monotonic()
            try:
                act()
            except (*MAY_FAIL, SessionBusy) as error:
                self._found.count(self._found.refused, type(error).__name__)
            except Exception as error:
                self._found.tell("lost", f"{act.__name__}: {type(error).__name__}: {error}")
            if time.monotonic() - began > DEADLINE_S + SETTLE_S + LATE_S:
                self._found.tell("hung", f"{act.__name__} took {time.monotonic() - began:.0f} s")

    def close(self) -> None:
        self._client.close()

    # Sessions.

    def _begin(self) -> None:
        if len(self.contexts) >= SESSIONS_EACH:
            return self._give_up()
        name, given = self._name(), self._tokens(20, 150)
        with suppress(AlreadyExists):  # it was created, but the answer was lost
            self._surely(lambda: self._client.create_session(name, token_ids=given))
        self.contexts[name] = given

    def _fork(self) -> None:
        name, of = self._name(), self._any()
        with suppress(AlreadyExists):
            self._surely(lambda: self._client.session(of).fork(name))
        self.contexts[name] = list(self.contexts[of])

    def _give_up(self) -> None:
        self.forget(self._any())

    def forget(self, name: str) -> None:
        """Delete a session that holds what it must."""
        self._look(name)
        with suppress(NotFound):
            self._surely(self._client.session(name).delete)
        del self.contexts[name]
        self._cut_off.pop(name, None)

    def _truncate(self) -> None:
        name = self._any()
        length = self._rng.randint(1, len(self.contexts[name]))
        self._surely(lambda: self._client.session(name).update(truncate_to=length))
        self.contexts[name] = self.contexts[name][:length]

    def _keep(self) -> None:
        session = self._client.session(self._any())
        if self._rng.random() < 0.5:
            session.keep(ttl_s=self._rng.uniform(1, 30))
        else:
            with suppress(NotFound):
                session.let_go()

    # Turns.

    def _take(self) -> None:
        name = self._any()
        if len(self.contexts[name]) > LONGEST:
            return self.forget(name)
        decoder, given = self._decoder(), self._tokens(1, 60)
        suffix = self._tokens(1, 20) if self._rng.random() < 0.2 else None
        sampling = self._sampling()
        how = self._rng.choices(("wait", "short", "cancel", "slow"), (70, 10, 12, 8))[0]
        asked = sampling | {"token_ids": given, "logprobs": 0} | ({"suffix_token_ids": suffix} if suffix else {})
        self._begun("grpc")
        began = time.monotonic()
        deadline = self._rng.uniform(*SHORT_S) if how == "short" else DEADLINE_S
        session, before = self._client.session(name), list(self.contexts[name])
        try:
            turn = self._turn(session, decoder, how, asked | {"timeout_s": deadline})
        except (*MAY_FAIL, SessionBusy) as error:
            self._in_time(began, deadline)
            if isinstance(error, SessionBusy) and began > self._cut_off.get(name, -HELD_S) + HELD_S:
                self._found.tell("lost", f"{name} was busy, and nobody had it: {error}")
            self._refused(error, how)
            self._settle(name, before, given, suffix, decoder, sampling)
            return
        self._in_time(began, deadline)
        if turn is None:
            self._settle(name, before, given, suffix, decoder, sampling)
            return
        self._cut_off.pop(name, None)
        prompt = [*before, *given, *(suffix or [])]
        self._compare(decoder, prompt, turn.token_ids, turn.logprobs, sampling, turn.usage.own_layers)
        self.contexts[name] = [*before, *given, *turn.token_ids]
        if self._rng.random() < 0.3:
            self._look(name)

    def _in_time(self, began: float, deadline: float) -> None:
        if (took := time.monotonic() - began) > deadline + LATE_S:
            self._found.tell("hung", f"a turn with {deadline:.1f} s took {took:.1f} s")

    def _turn(self, session: RemoteSession, decoder: str, how: str, asked: dict):
        """The turn; None if this client has left it."""
        if how in ("wait", "short"):
            return session.turn(decoder, **asked)
        pieces, stays = [], self._rng.randint(0, 12)
        stream = session.stream(decoder, **asked)
        for piece in stream:
            pieces.append(piece)
            if how == "slow":
                time.sleep(self._rng.uniform(0, 0.4))
            elif len(pieces) > stays:
                stream.close()
                self._found.count(self._found.left, "cancelled")
                return None
        return collect(pieces)

    def _settle(
        self, name: str, before: list[int], given: list[int], suffix: list[int] | None, decoder: str, sampling: dict
    ) -> None:
        """A turn ended otherwise than well: the session is as it was, or has the whole turn."""
        self._cut_off[name] = time.monotonic()
        context = self._still(name)
        if context == before:
            return
        behind = [*before, *given]
        said = context[len(behind) :]
        if context[: len(behind)] != behind or not said:
            self._found.tell("wrong", f"{name} has {len(context)} tokens, neither {len(before)} nor a turn of {decoder} more")
        else:
            self._check_committed(decoder, [*behind, *(suffix or [])], said, sampling)
        self.contexts[name] = context

    def _check_committed(self, decoder: str, prompt: list[int], said: list[int], sampling: dict) -> None:
        """A session has a turn whose answer was lost: it must be the whole of it."""
        layers, most = OWN_LAYERS.get(decoder, ""), sampling["max_tokens"]
        if problem := self._truth.problem(decoder, prompt, said, None, sampling["temperature"] == 0, layers):
            self._found.tell("wrong", f"{problem} (committed, but its answer was lost)")
        elif len(said) != most:
            self._found.tell("wrong", f"{decoder} has {len(said)} tokens, not {most} (its answer was lost)")

    def _two_at_once(self) -> None:
        """Two turns on one session: one is refused, or comes behind the other."""
        name, decoders = self._any(), (self._decoder(), self._decoder())
        if len(self.contexts[name]) > LONGEST:
            return self.forget(name)
        before, given, sampling = list(self.contexts[name]), [self._tokens(1, 40) for _ in range(2)], self._sampling()
        take, asked = self._client.session(name).turn, sampling | {"logprobs": 0, "timeout_s": DEADLINE_S}
        with ThreadPoolExecutor(2) as pool:
            ended = [
                pool.submit(take, decoder, token_ids=ids, **asked)
                for decoder, ids in zip(decoders, given, strict=True)
            ]
        for _ in ended:
            self._begun("grpc")
        self._cut_off[name] = time.monotonic()
        context, answered, uncertain = self._still(name), [], []
        for turn, decoder, ids in zip(ended, decoders, given, strict=True):
            error = turn.exception()
            if error is None:
                answered.append((decoder, ids, turn.result()))
            elif isinstance(error, (*MAY_FAIL, SessionBusy)):
                self._refused(error, "two at once")
                if not isinstance(error, SessionBusy):
                    uncertain.append((decoder, ids))
            else:
                self._found.tell("lost", f"two turns at once: {type(error).__name__}: {error}")
        self._account(name, before, context, answered, uncertain, sampling)
        self.contexts[name] = context

    def _account(
        self, name: str, before: list[int], context: list[int], answered: list, uncertain: list, sampling: dict
    ) -> None:
        """After two turns at once, each that was answered is in the context once, in either order; one that failed may be."""
        at, left = before, list(answered)
        while left:
            one = next((one for one in left if _goes_on(context, [*at, *one[1], *one[2].token_ids])), None)
            if one is None:
                break
            decoder, ids, said = one
            self._compare(decoder, [*at, *ids], said.token_ids, said.logprobs, sampling, said.usage.own_layers)
            at = [*at, *ids, *said.token_ids]
            left.remove(one)
        for decoder, ids in uncertain:
            said = context[len(at) + len(ids) :]
            if said and _goes_on(context, [*at, *ids]):
                self._check_committed(decoder, [*at, *ids], said, sampling)
                at = context
        if left or at != context:
            missing = ", ".join(decoder for decoder, *_ in left) or "none"
            self._found.tell("wrong", f"{name} after two turns at once: {len(context)} tokens, {len(at)} of them explained; "
                             f"answered and not there: {missing}")  # fmt: skip

    def _unknown(self) -> None:
        """Mistakes are told as such, whatever else fails."""
        name = self._any()
        with suppress(InvalidInput, NotFound):
            self._client.session(name).turn("nobody", token_ids=[1], timeout_s=DEADLINE_S)
            self._found.tell("wrong", "a decoder that is not served has answered")
        with suppress(InvalidInput):
            self._client.session(name).turn("a", token_ids=[10**6], timeout_s=DEADLINE_S)
            self._found.tell("wrong", "a token that there is not was taken")
        with suppress(NotFound, InvalidInput):
            self._client.session(self._name()).turn(COMES_AND_GOES, token_ids=[1], max_tokens=1, timeout_s=DEADLINE_S)
            self._found.tell("wrong", "a session that there is not has taken a turn")

    # Over HTTP.

    def _hang_up(self) -> None:
        with suppress(OSError):
            hang_up(self._url, self._rng.choice(DECODERS), self._rng.randrange(1000), 100)
        self._found.count(self._found.left, "hung up")

    def _over_http(self) -> None:
        self._begun("http")
        try:
            self._http.ask(self._decoder(), self._tokens(4, 120), self._sampling())
        except Refused as error:
            self._found.count(self._found.refused, str(error))

    # What comes of it.

    def _compare(
        self, decoder: str, prompt: list[int], tokens: list[int], logprobs: list[float], sampling: dict, own_layers: str
    ) -> None:
        compare(self._truth, self._found, decoder, prompt, tokens, logprobs, sampling, own_layers)
        if sampling["temperature"] and self._rng.random() < AGAIN:
            self.again.append(Again(decoder, prompt, sampling, tokens))

    def ask_again(self) -> None:
        """Ask some of the turns a second time. Called when all is quiet."""
        for one in self.again:
            session = self._client.create_session(token_ids=one.prompt[:-1] or None)
            turn = session.turn(one.decoder, token_ids=one.prompt[-1:], timeout_s=DEADLINE_S, **one.sampling)
            session.delete()
            self._found.add(asked_again=1)
            if turn.token_ids != one.tokens:
                self._found.tell("wrong", f"{one.decoder}, asked again with {one.sampling}, says something else")
        self.again.clear()

    def _begun(self, surface: str) -> None:
        self._found.add(turns=1)
        self._found.count(self._found.surfaces, surface)

    def _refused(self, error: PrefillShareError, how: str) -> None:
        if how == "short" and isinstance(error, DeadlineExceeded):
            self._found.count(self._found.left, "deadline")
        else:
            self._found.count(self._found.refused, type(error).__name__)

    def _look(self, name: str) -> None:
        """The session must be its history."""
        context = self._still(name) if name in self._cut_off else self._context(name)
        if context != self.contexts[name]:
            self._found.tell("wrong", f"{name} is not its history: {len(context)} tokens, not {len(self.contexts[name])}")
            self.contexts[name] = context

    def _context(self, name: str) -> list[int]:
        return list(self._surely(lambda: self._client.session(name).get(with_token_ids=True)).token_ids)

    def _still(self, name: str) -> list[int]:
        """A session's context when nothing changes it any more."""
        context = self._context(name)
        while True:
            time.sleep(0.5)
            if context == (context := self._context(name)):
                return context

    @staticmethod
    def _surely(call):
        """Until it succeeds: the session store may be away, or a router, or the session held by what was cut off."""
        for error_allowed in _until(SETTLE_S):
            try:
                return call()
            except (*MAY_FAIL, SessionBusy):
                if not error_allowed:
                    raise

    # What is drawn.

    def _any(self) -> str:
        return self._rng.choice(list(self.contexts))

    def _name(self) -> str:
        return f"{self._number}-{self._rng.getrandbits(48):x}"

    def _decoder(self) -> str:
        return self._rng.choice(DECODERS)

    def _tokens(self, least: int, most: int) -> list[int]:
        return [self._rng.randrange(VOCABULARY) for _ in range(self._rng.randint(least, most))]

    def _sampling(self) -> dict:
        drawn = {"temperature": 0.8, "seed": self._rng.randrange(10_000)} if self._rng.random() < 0.4 else {"temperature": 0}
        return {"max_tokens": self._rng.randint(2, 30), "ignore_eos": True} | drawn


def _goes_on(context: list[int], beginning: list[int]) -> bool:
    return context[: len(beginning)] == beginning


def _until(seconds: float) -> Iterator[bool]:
    """True until the time is over, then False."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield True
        time.sleep(0.3)
    yield False


def run_all(agents: list[Agent], limit_s: float) -> list[int]:
    """Run them, each in a thread of its own. Returns the numbers of those that have not ended in time."""
    threads = [threading.Thread(target=agent.run, daemon=True) for agent in agents]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [number for number, thread in enumerate(threads) if thread.is_alive()]
