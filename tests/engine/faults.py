"""Ways to break a replica, and checks of what must hold before and after."""

from __future__ import annotations

from contextlib import contextmanager

import psutil
from conftest import wait_until
from oracle import TOLERANCE

from prefillshare.client import collect


def processes(running, pool: str, replica: str) -> list[psutil.Process]:
    """The replica's own process, then its engine's."""
    parent = psutil.Process(running.info()[pool][replica]["pid"])
    return [parent, *parent.children(recursive=True)]


def wait_whole(running, *pools: str):
    """Wait until all replicas that the deployment asks for are usable in these pools, or in all pools if none is named."""
    deployment = running.deployment
    wanted = {pool.pool: pool.replicas for pool in deployment.decode}
    if prefill := deployment.shared_prefill:
        wanted["prefill"] = prefill.replicas
    looked_at = pools or tuple(wanted)

    def whole() -> bool:
        info = running.info()
        if not pools and info.keys() != wanted.keys():
            return False
        usable = {name: [replica["usable"] for replica in info[name].values()] for name in looked_at}
        return all(replicas == [True] * wanted[name] for name, replicas in usable.items())

    wait_until(whole, 150)


@contextmanager
def kept_whole(running):
    """Before and after, all replicas that the deployment asks for are usable and hold nothing."""
    wait_whole(running)
    yield
    wait_whole(running)
    running.wait_until_nothing_is_held(30)


def kill(running, pool: str, replica: str) -> list[psutil.Process]:
    """Kill the replica's own process. The returned list also contains the processes that it had started."""
    victims = processes(running, pool, replica)
    victims[0].kill()
    return victims


def kill_busy(running, pool: str) -> list[psutil.Process]:
    """Kill the one replica of the pool that has calls."""
    (busy,) = {replica for replica, stats in running.stats_by_replica()[pool].items() if stats["active"]}
    return kill(running, pool, busy)


def disturbed(running, oracle, decoder: str, prompt: list[int], disturb, *, after: int = 8, **sampling):
    """Take a turn, checked by the oracle, during which `disturb()` is called as soon as `after` tokens have come."""
    session = running.client.create_session()

    def watched():
        seen, todo = 0, [disturb]
        for piece in session.stream(decoder, token_ids=prompt, logprobs=0, ignore_eos=True, **sampling):
            seen += len(piece.token_ids)
            if seen >= after and todo:
                todo.pop()()
            yield piece
        assert not todo

    turn = collect(watched())
    own_layers = turn.usage.own_layers
    assert oracle.diff(decoder, prompt, turn.token_ids, turn.logprobs, own_layers=own_layers) <= TOLERANCE
    assert list(session.get(with_token_ids=True).token_ids) == prompt + turn.token_ids
    return turn
