"""The stages of a proof, in the order of their importance: what does not fit into the time is left out from the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare.modes import modes
from prefillshare.proof import exact, served, steps, system
from prefillshare.proof.asked import Asked
from prefillshare.proof.found import Tell
from prefillshare.proof.subject import in_place


@dataclass(frozen=True)
class Stage:
    """`engines`: how many its process starts. `limit_s`: when it is ended; much later than it should end by itself.
    `in_served_dtype`: its engines have the dtype that was asked for."""

    name: str
    about: str
    run: Callable[[Asked, Tell], Awaitable[None]]
    engines: int
    limit_s: float = 240.0
    in_served_dtype: bool = False


#: Packages without which the whole system cannot be started.
SERVES = ("ray", "grpc", "dynamo", "uvicorn")


def stages() -> dict[str, Stage]:
    """By name. The whole system is among them where what it needs is installed."""
    sharing, together = [mode for mode in modes() if mode.shares_prefill], in_place()
    apart = [mode for mode in sharing if mode not in together]
    exactly = "in float32, every token's log-probability is what plain transformers says"
    answers = "answers in the served dtype"
    found = [
        *(Stage(f"exact-{one.name}", f"mode {one.name}: {exactly}", partial(exact.run, mode=one.name), 2) for one in sharing),
        Stage("served", f"{answers}; KV between processes; speed beside stock vLLM", served.run, len(together) + 2,
              in_served_dtype=True),
        *(Stage(f"served-{one.name}", f"mode {one.name}: {answers}", partial(served.run_apart, mode=one.name), 2,
                in_served_dtype=True) for one in apart),
        *([Stage("system", f"sessions through router and Ray Serve: {answers}", system.run, 0, in_served_dtype=True)]
          if all(map(find_spec, SERVES)) else []),
        Stage("steps", "a decode step with two streams, at the shape of a large base", steps.run, len(together),
              in_served_dtype=True),
    ]  # fmt: skip
    return {one.name: one for one in found}


def choose(names: Sequence[str]) -> list[Stage]:
    """The stages whose names begin with one of `names`, in their order; all if there are none. Raises InvalidInput."""
    known = stages()
    for name in names:
        if not any(one.startswith(name) for one in known):
            raise InvalidInput(f"there is no stage {name!r}", field="--stage", fix=f"one of {', '.join(known)}")
    return [stage for one, stage in known.items() if not names or one.startswith(tuple(names))]
