"""What engines and routers did in one turn, as steps of the model in handoffs.py, and whether the model can do it, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
from double.engines import DecodeEngine, Leases, PrefillEngine

from prefillshare.kvshare.errors import PrefixLost
from protocol import handoffs
from protocol.handoffs import World

#: Steps of which nothing can be seen from outside, or which the trace does not tell.
HIDDEN = {*handoffs.FAULTS, "gives-up", "cached", "given-up", "released"}


@contextmanager
def recorded(request: str) -> Iterator[list[str]]:
    """The steps of the turns whose requests' names begin like this, in order. Nothing else may lend its response meanwhile."""
    steps: list[str] = []
    whose: dict[str, str] = {}
    prefill, decode, read = PrefillEngine.prefill, DecodeEngine.decode, Leases.read

    def attempt(name: str) -> str:
        return f"attempt {name.rpartition('-')[2]}"

    async def recorded_prefill(self, token_ids, request_id, **how):
        if not request_id.startswith(request):
            return await prefill(self, token_ids, request_id, **how)
        steps.append("asks")
        result = await prefill(self, token_ids, request_id, **how)
        whose[result.handoff.transfer["lease"]] = attempt(request_id)
        steps.append(f"made {attempt(request_id)}")
        return result

    async def recorded_decode(self, asked):
        mine = asked.request_id.startswith(request) and asked.handoff
        if mine:
            steps.append(f"loads {attempt(asked.request_id)}")
        async for chunk in decode(self, asked):
            if chunk.lent:
                whose[chunk.lent.transfer["lease"]] = "loan"
            if mine:
                last = "last-token-lends" if chunk.lent else "last-token"
                steps.append(f"{last if chunk.finish_reason else 'token'} {attempt(asked.request_id)}")
            yield chunk

    def recorded_read(self, handoff):
        name = whose.get(handoff.transfer["lease"], "")
        try:
            kv = read(self, handoff)
        except PrefixLost:
            steps.extend([f"late {name}"] if name else [])
            raise
        steps.extend([f"loads {name}", f"read {name}"] if name == "loan" else [f"read {name}"] if name else [])
        return kv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefillEngine, "prefill", recorded_prefill)
        patch.setattr(DecodeEngine, "decode", recorded_decode)
        patch.setattr(Leases, "read", recorded_read)
        yield steps


def problem(steps: Iterable[str]) -> str:
    """The first step that the model cannot do after those before it; empty if it can do all."""
    worlds = _hidden({World()})
    for number, wanted in enumerate(steps):
        worlds = _hidden({after for world in worlds for what, after in handoffs.steps(world) if _is(what, wanted)})
        if not worlds:
            return f"step {number}: {wanted}"
    return ""


def _is(what: str, wanted: str) -> bool:
    """A token that an orphan says is a token; of loans there is one."""
    name, _, whose = what.partition(" ")
    seen, _, who = wanted.partition(" ")
    if seen.startswith(("token", "last-token")) and name == "token-unheard":
        return whose == who
    return name == seen and (whose == who or (who == "loan" and whose.startswith("loan")))


def _hidden(worlds: set[World]) -> set[World]:
    """These, and those that they become by hidden steps."""
    found, new = set(worlds), list(worlds)
    while new:
        for what, after in handoffs.steps(new.pop()):
            if what.split()[0] in HIDDEN and after not in found:
                found.add(after)
                new.append(after)
    return found
