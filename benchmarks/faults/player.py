"""Turns over multi-turn gRPC sessions: a trace of them, and a player that keeps the outcome of each."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.shared.small import ADDRESS, DECODERS, VOCABULARY
from prefillshare.client import Client, RemoteSession
from prefillshare.kvshare.errors import Conflict, ConnectionLost, DeadlineExceeded, NotFound, PrefillShareError, Unavailable

TURNS_PER_SESSION = 4
INPUT, OUTPUT = (20, 120), (20, 60)
TURN_TIMEOUT_S = 120
PAUSE_S = 0.1


@dataclass(frozen=True)
class Turn:
    decoder: str
    token_ids: tuple[int, ...]
    sampling: dict


def make_trace(turns: int, seed: int = 0) -> list[list[Turn]]:
    """Sessions of TURNS_PER_SESSION turns."""
    rng, sessions = random.Random(seed), []
    for number in range(-(-turns // TURNS_PER_SESSION)):
        sessions.append([
            Turn(
                rng.choice(DECODERS),
                tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(*INPUT))),
                {"max_tokens": rng.randint(*OUTPUT), "ignore_eos": True}
                | ({"temperature": 0.8, "seed": rng.randrange(10_000)} if rng.random() < 0.5 else {}),
            )
            for _ in range(min(TURNS_PER_SESSION, turns - number * TURNS_PER_SESSION))
        ])  # fmt: skip
    return sessions


#: Round, session, turn.
Key = tuple[int, int, int]


class Player:
    """Plays sessions, several at a time; keeps each turn's tokens, or how it failed."""

    def __init__(self, at_once: int, advance: Callable[[], None]):
        self._at_once, self._advance = at_once, advance
        self.tokens: dict[Key, list[int]] = {}
        self.seconds: dict[Key, float] = {}
        self.began_at: dict[Key, float] = {}
        self.resumes = self.taken_again = self.rounds = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def play(self, sessions: list[list[Turn]]) -> None:
        with ThreadPoolExecutor(self._at_once) as pool:
            for ended in [pool.submit(self._connected, number, turns) for number, turns in enumerate(sessions)]:
                ended.result()
        self.rounds += 1

    def _connected(self, number: int, turns: list[Turn]) -> None:
        with Client(ADDRESS, retries=None) as client:
            self._session(client, number, turns)

    def _session(self, client: Client, number: int, turns: list[Turn]) -> None:
        name, context = f"{self.rounds}-{number}-{random.getrandbits(32):x}", []
        with suppress(Conflict):  # it was created, but the answer was lost
            self._until_connected(lambda: client.create_session(name))
        session = client.session(name)
        for count, turn in enumerate(turns):
            key, began = (self.rounds, number, count), time.monotonic()
            context += turn.token_ids
            try:
                tokens = self._turn(session, context, turn)
            except PrefillShareError as error:
                with self._lock:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    self._advance()
                break  # later turns build on this one
            context += tokens
            with self._lock:
                self.tokens[key] = tokens
                self.began_at[key] = began
                self.seconds[key] = time.monotonic() - began
                self._advance()
        with suppress(NotFound):
            self._until_connected(session.delete)

    def _turn(self, session: RemoteSession, seen: list[int], turn: Turn) -> list[int]:
        """The turn's tokens. `seen`: the context with the turn's input. If the router died meanwhile, the turn is taken again
        unless it had been committed."""
        deadline, connected = time.monotonic() + TURN_TIMEOUT_S, True
        while True:
            try:
                result = session.turn(turn.decoder, token_ids=turn.token_ids, timeout_s=TURN_TIMEOUT_S, **turn.sampling)
                with self._lock:
                    self.resumes += result.usage.resumes
                return result.token_ids
            except Unavailable as error:
                if not may_be_taken_again(error):
                    raise
                if connected:
                    with self._lock:
                        self.taken_again += 1
                connected = False
            except Conflict:  # the dead router still holds the session
                if connected:
                    raise
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"a turn could not be taken for {TURN_TIMEOUT_S} s")
            context = self._until_connected(lambda: session.get(with_token_ids=True)).token_ids
            if len(context) > len(seen):
                return list(context[len(seen) :])
            time.sleep(PAUSE_S)

    @staticmethod
    def _until_connected(call):
        deadline = time.monotonic() + TURN_TIMEOUT_S
        while True:
            try:
                return call()
            except Unavailable as error:
                if not may_be_taken_again(error) or time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_S)


def may_be_taken_again(error: Unavailable) -> bool:
    """Whether the router died or the session store is away: then the session says whether the turn was committed."""
    return isinstance(error, ConnectionLost) or "session store" in error.message
