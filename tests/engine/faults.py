"""Ways to break a replica, and what must hold around each."""

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


@contextmanager
def kept_whole(running):
    """Before and after, all replicas are usable, as many as are asked for, and hold nothing."""
    deployment = running.deployment
    wanted = {"prefill": deployment.prefill.replicas} | {pool.pool: pool.replicas for pool in deployment.decode}

    def whole():
        pools = running.info()
        usable = {name: sum(r["usable"] for r in pool.values()) for name, pool in pools.items()}
        return usable == wanted == {name: len(pool) for name, pool in pools.items()}

    wait_until(whole, 150)
    yield
    wait_until(whole, 150)
    wait_until(lambda: not running.held(), 30)


def kill(running, pool: str, replica: str) -> list[psutil.Process]:
    """Its own process; what it had started is in the list, too."""
    victims = processes(running, pool, replica)
    victims[0].kill()
    return victims


def disturbed(running, oracle, decoder: str, prompt: list[int], disturb, *, after: int = 8, **sampling):
    """A turn during which `disturb()` is called once `after` tokens have come; checked by the oracle."""
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
