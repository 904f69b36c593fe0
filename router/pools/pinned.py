"""Sends a call to one chosen replica, and keeps track of which replicas there are.
Seam: ray/serve/_private/request_router/request_router.py (`_choose_replica_for_request`, called once for each try)

Serve asks a RequestRouter for a replica per request; ours takes the one whose id the caller put into
`handle.options(session_id=...)`, and fails at once if it is gone, where Serve's own would take another, or wait until there is
one. Serve tries again while a replica's queue is full, and while a replica that has died is still a member.
Serve's controller pushes changes of membership to it; a replica that is stopping is no longer a member.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter

from prefillshare.kvshare.errors import ReplicaLost

#: Seconds between two tries to give one replica a call.
RETRY_S = 0.02
#: (application, deployment) -> ids of its running replicas, as last pushed to this process.
MEMBERS: dict[tuple[str, str], frozenset[str]] = {}
#: Called from Serve's thread when MEMBERS has changed.
WATCHERS: dict[tuple[str, str], Callable[[], None]] = {}


def tell(deployment: tuple[str, str], replicas: Collection[str]) -> None:
    MEMBERS[deployment] = frozenset(replicas)
    if watcher := WATCHERS.get(deployment):
        watcher()


class PinnedRouter(RequestRouter):
    #: Id -> replica, of those that are members.
    _pinned: Mapping[str, RunningReplica] = MappingProxyType({})

    def update_replicas(self, replicas):
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id):
        super().on_replica_actor_died(replica_id)
        self._tell()

    def _tell(self) -> None:
        from prefillshare.router.pools.pinned import (
            tell,  # Serve sends this class by value: its own globals are not the module's
        )

        deployment = self._deployment_id
        self._pinned = {replica_id.unique_id: replica for replica_id, replica in self.curr_replicas.items()}
        tell((deployment.app_name, deployment.name), self._pinned)

    async def _choose_replica_for_request(self, pending_request, *, is_retry=False):
        pinned = pending_request.metadata.session_id
        if not pinned:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        if is_retry:
            await asyncio.sleep(RETRY_S)
        if replica := self._pinned.get(pinned):
            return replica
        raise ReplicaLost(f"replica {pinned} is gone", fix="try again")

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        """For calls that any replica may answer."""
        return [candidate_replicas]
