"""The tries of one turn: when its router died, it is taken again only if it was not committed, which the session's number of
turns shows. The server checks the number again with the new try (GenerateRequest.expected_turns), so that a turn that is
committed late is not taken twice either."""

from __future__ import annotations

from prefillshare.client.retries import Retries, Tries
from prefillshare.kvshare import errors
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb


class Taking:
    """`turns`: how many the session has had before; None: not known, and a turn whose outcome is unknown is not taken again."""

    def __init__(self, request: pb.GenerateRequest, policy: Retries, timeout_s: float, turns: int | None):
        self.request, self.policy, self._turns = request, policy, turns
        self._tries = Tries(policy, timeout_s)
        self._is_kept = request.sampling.n <= 1

    @property
    def left_s(self) -> float:
        return self._tries.left_s

    def pause_s(self, error: errors.PrefillShareError) -> float:
        """Seconds before the next try. Raises the error if there is none, and AnswerLost if the turn was committed."""
        uncertain = self._tries.is_uncertain
        if uncertain and isinstance(error, errors.Conflict) and error.field == "expected_turns":
            raise self._lost(error.message) from error
        # The lost try holds the session until the server notices that its client is gone, or its router's lease ends.
        held = uncertain and isinstance(error, errors.SessionBusy)
        return self._tries.pause_s(error, not self._is_kept or self._turns is not None, counts=not held)

    @property
    def must_look(self) -> bool:
        """Whether the session must be looked at before the next try."""
        return self._tries.is_uncertain and self._is_kept

    def found(self, turns: int) -> None:
        """The session has had so many turns. Raises AnswerLost."""
        if turns != self._turns:
            raise self._lost(f"session {self.request.session_id!r} has had {turns} turns, not {self._turns}")
        self.request.expected_turns = turns

    def _lost(self, message: str) -> errors.AnswerLost:
        return errors.AnswerLost(
            f"the connection broke, and {message}: this turn, or another client's, was committed",
            fix="go on from the session's context, which holds the answer, or truncate it",
        )
