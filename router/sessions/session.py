"""What a session is: a context of token ids, and what is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from prefillshare.router.sessions.transcript import Transcript

_SEVERAL = "+"


@dataclass(frozen=True)
class OwnPart:
    """An agent's own part of the prompt, which the context does not contain: where it stands in its agent's turns, as long as
    these follow each other, in tokens of the context, and a digest of it. `several`: other agents have taken turns before."""

    tokens: int
    digest: str
    several: bool = False

    def __str__(self) -> str:
        """For a store; `parsed` is the inverse."""
        return f"{self.tokens}:{self.digest}{_SEVERAL if self.several else ''}"

    @classmethod
    def parsed(cls, written: str) -> OwnPart | None:
        """None for what `__str__` has not written."""
        tokens, _, digest = written.removesuffix(_SEVERAL).partition(":")
        known = tokens.isascii() and tokens.isdigit() and digest
        return cls(int(tokens), digest, written.endswith(_SEVERAL)) if known else None


@dataclass(frozen=True)
class Mark:
    """A place in a session's context at which a turn has ended: `tokens` before it, and what a Session says of them."""

    tokens: int
    open_response: bool = False
    transcript: Transcript | None = None
    own: OwnPart | None = None


@dataclass
class Session:
    """A session as it was when the store was asked. Only a commit by the turn that holds it changes what is stored."""

    session_id: str
    tenant: str = ""
    token_ids: tuple[int, ...] = ()
    turns: int = 0
    #: True while the context ends in a response to chat messages that has not been closed yet (router/sessions/chat.py).
    open_response: bool = False
    #: Pool -> replica that its last turn ran on, for prefill and decode. What a turn changes here is stored by its commit.
    replicas: dict[str, str] = field(default_factory=dict)
    #: Cache domain within which this session's KV is shared; a fork has its parent's.
    cache_domain: str = ""
    #: What the context says as chat messages; None if it does not consist of messages only.
    transcript: Transcript | None = None
    #: That of the agent that took the last turn; None: it had none, or the turn was not a chat's.
    own: OwnPart | None = None
    #: A turn holds it.
    busy: bool = False
    #: Grows with every commit. A commit is refused if the stored version is not the one that its turn began from.
    version: int = 0
    #: The turn that this object was handed to; empty outside a turn.
    turn_id: str = ""
    #: Its own time to live in seconds; None: the store's.
    ttl_s: float | None = None
    #: Ids of the tool calls in its context that no result answers; None: not known.
    unanswered: tuple[str, ...] | None = None

    @property
    def mark(self) -> Mark:
        """The end of the context."""
        return Mark(len(self.token_ids), self.open_response, self.transcript, self.own)

    def at(self, mark: Mark) -> Session:
        """The session as it was at that place."""
        state = {"open_response": mark.open_response, "transcript": mark.transcript, "own": mark.own, "unanswered": None}
        return replace(self, token_ids=self.token_ids[: mark.tokens], **state)

    def committed(
        self,
        token_ids: Sequence[int],
        open_response: bool,
        transcript: Transcript | None,
        own: OwnPart | None,
        is_turn: bool,
        unanswered: Sequence[str] | None,
    ) -> None:
        """Bring it up to date with what a store has committed."""
        self.token_ids, self.open_response = tuple(token_ids), open_response
        self.transcript, self.own = transcript, own
        self.unanswered = None if unanswered is None else tuple(unanswered)
        self.turns += is_turn
        self.version += 1
