"""A pool of one prefill replica that lacks `missing` tokens of every prompt."""

from contextlib import asynccontextmanager
from types import SimpleNamespace


class OneReplica:
    """`methods`: the replica's, as in Serve's handle: they are called with `.remote()`, and what they return is awaited."""

    missing = 90

    def __init__(self, **methods):
        replica = SimpleNamespace(**{name: SimpleNamespace(remote=method) for name, method in methods.items()})
        self.replicas = SimpleNamespace(on=lambda _: replica)

    async def choose(self, tokens, keys):
        cached = max(0, tokens - self.missing)
        return SimpleNamespace(replica=SimpleNamespace(id="one"), cached_tokens=cached, missing_tokens=self.missing)

    @asynccontextmanager
    async def calling(self, placement):
        yield

    def coming(self, placement, keys): ...
