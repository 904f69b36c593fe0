"""Sends a call to one chosen replica, and keeps track of which replicas there are.
Seam: ray/serve/_private/request_router/request_router.py

Serve asks a RequestRouter for a replica per request; ours takes the one whose id the caller put into
`handle.options(session_id=...)`, and fails at once if it is gone, where Serve's own would wait or take another.
Serve's controller pushes changes of membership to it; a replica that is stopping is no longer a member.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from ray.serve._private.request_router.request_router import RequestRouter

from prefillshare.kvshare.errors import ReplicaLost

#: (application, deployment) -> ids of its running replicas, as last pushed to this process.
MEMBERS: dict[tuple[str, str], frozenset[str]] = {}
#: Called from Serve's thread when MEMBERS has changed.
WATCHERS: dict[tuple[str, str], Callable[[], None]] = {}


def tell(deployment: tuple[str, str], replicas: Collection[str]) -> None:
    MEMBERS[deployment] = frozenset(replicas)
    if watcher := WATCHERS.get(deployment):
        watcher()


class PinnedRouter(RequestRouter):
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
        tell((deployment.app_name, deployment.name), [r.unique_id for r in self.curr_replicas])

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        pinned = pending_request.metadata.session_id if pending_request is not None else None
        if not pinned:
            return [candidate_replicas]
        tries = pending_request._pin_tries = getattr(pending_request, "_pin_tries", -1) + 1
        if tries:  # Serve asks again only while the replica's queue was full; let it drain
            await asyncio.sleep(0.02)
        if not pending_request.future.done():
            replica = next((r for r in candidate_replicas if r.replica_id.unique_id == pinned), None)
            if replica is not None:
                pending_request.future.set_result(replica)
            else:
                pending_request.future.set_exception(ReplicaLost(f"replica {pinned} is gone", fix="try again"))
            # Serve matches waiting requests to replicas on its own as well; this one is settled.
            self._remove_pending_request_from_indices(pending_request)
        return [candidate_replicas]
