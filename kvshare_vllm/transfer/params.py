"""`kv_transfer_params`: what a request asks of an engine beside its tokens, and what the engine reports with its outputs.

vLLM passes these dicts from an engine's front end to its scheduler and connector, and back. Their keys are read and written
only here. The keys that say where KV lies are the transport's own: they come with a handoff and are passed on unchanged.

Seam: vllm/distributed/kv_transfer/kv_connector/v1/nixl/pull_scheduler.py (`do_remote_prefill`, `do_remote_decode`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prefillshare.kvshare.errors import ResumeReason
from prefillshare.kvshare.layer_group import LayerGroup

#: vLLM's: a load is still due (it unsets this once the load has begun); KV is to be held for another engine.
_DUE, _HOLD = "do_remote_prefill", "do_remote_decode"
_REPLAY, _LEND, _OWN_LAYERS, _OWN_TOKENS, _OWN_PREFILL = "replay_tokens", "lend", "own_layers", "own_tokens", "own_prefill"
_RESUME, _REFUSED = "resume_reason", "refused"

Params = dict[str, Any]


# What is asked ------------------------------------------------------------------------------------------------------------


def to_hold() -> Params:
    """Compute the prompt's KV, and hold it for a decode engine."""
    return {_HOLD: True, _DUE: False, "remote_engine_id": None, "remote_block_ids": None}


def to_read(
    transfer: Mapping[str, Any] | None,
    *,
    replay: int = 0,
    lend: bool = False,
    own_layers: LayerGroup | None = None,
    own_tokens: int = 1,
) -> Params:
    """Read the shared prefix from where `transfer` says, if there is one. `replay`: tokens at the end that the turn has
    generated before. `lend`: hold all KV at the end. `own_layers`: computed here over the prefix instead of read. `own_tokens`:
    how many of the prompt's last tokens are not in the prefix."""
    asked = {**(transfer or {}), _REPLAY: replay, _LEND: lend, _OWN_TOKENS: own_tokens}
    return asked | {_OWN_LAYERS: str(own_layers)} if own_layers else asked


def to_pull(transfer: Mapping[str, Any], blocks: int) -> Params:
    """Read the first `blocks` blocks of what has been lent, and hold nothing."""
    cut = [group[:blocks] for group in transfer["remote_block_ids"]]
    return {**transfer, "remote_block_ids": cut, _DUE: True, _HOLD: False, _LEND: False}


def to_be_released(transfer: Mapping[str, Any]) -> Params:
    """Nobody will read what `transfer` leads to."""
    return {**transfer, _DUE: True}


def to_prefill_alone() -> Params:
    """The decoder computes all KV itself, for comparison; none of it is shared."""
    return {_OWN_PREFILL: True}


class Asked:
    """What a request in an engine asks for: a view, since vLLM changes the dict while the request runs."""

    __slots__ = ("_params",)

    def __init__(self, params: Mapping[str, Any] | None):
        self._params = params or {}

    @property
    def load_is_due(self) -> bool:
        """The request comes with a handoff whose load has not begun."""
        return bool(self._params.get(_DUE))

    @property
    def lends(self) -> bool:
        return bool(self._params.get(_LEND))

    @property
    def holds_nothing(self) -> bool:
        """The request is a decode engine's, or a pull, and must leave no KV held at its end. False for other requests of a
        prefill engine."""
        return not self._params.get(_LEND, True) and not self.load_is_due

    @property
    def replay_tokens(self) -> int:
        return self._params.get(_REPLAY, 0)

    @property
    def own_layers(self) -> LayerGroup | None:
        return LayerGroup.parse(self._params[_OWN_LAYERS]) if self._params.get(_OWN_LAYERS) else None

    @property
    def own_tokens(self) -> int:
        return self._params.get(_OWN_TOKENS, 1)

    @property
    def prefills_alone(self) -> bool:
        return bool(self._params.get(_OWN_PREFILL))


# What is told -------------------------------------------------------------------------------------------------------------


@dataclass
class LoadCost:
    """What loading a request's prefix cost; told with every output, since the front end merges outputs and keeps the last's."""

    pulled_bytes: int = 0
    #: Prompt tokens found in the engine's own cache.
    local_tokens: int = 0
    #: Seconds until the request could begin, and, where it began with layers of its own, until the other layers' KV was there.
    load_s: float = 0.0
    rest_load_s: float = 0.0

    def told(self) -> Params:
        return asdict(self)


def given_back(reason: ResumeReason) -> Params:
    """The request has lost its prefix, and may be taken up again."""
    return {_RESUME: reason.value}


def refused(why: str) -> Params:
    return {_REFUSED: why}


class Told:
    """What an engine's output reports."""

    __slots__ = ("_params",)

    def __init__(self, params: Mapping[str, Any] | None):
        self._params = params or {}

    @property
    def cost(self) -> LoadCost:
        return LoadCost(**{name: self._params[name] for name in LoadCost.__dataclass_fields__ if name in self._params})

    @property
    def lost_by(self) -> ResumeReason | None:
        return ResumeReason(self._params[_RESUME]) if _RESUME in self._params else None

    @property
    def refused(self) -> str | None:
        return self._params.get(_REFUSED)

    @property
    def lent(self) -> tuple[Params, int] | None:
        """The transport's own keys, and the number of tokens whose KV they lead to; None if nothing is lent."""
        return (dict(self._params), self._params["remote_num_tokens"]) if self._params.get(_HOLD) else None
