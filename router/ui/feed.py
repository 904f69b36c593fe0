"""What the page at /ui shows to one tenant: pools and replicas as this router sees them, and the tenant's recent turns.

An answer is bounded: by the turns that are kept of a tenant (RecentTurns), by MOST_REPLICAS, and by the deployment file.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.router.core import Core
from prefillshare.router.pools.replica import Replica
from prefillshare.router.telemetry.recent_turns import NAME_CHARS, RecentTurn, RecentTurns

#: Grows when a key changes its meaning or goes away.
VERSION = 1
#: Replicas of one pool that are listed.
MOST_REPLICAS = 64
#: Routers that a page may know.
MOST_ROUTERS = 64
_KNOWN = re.compile(r"[0-9a-f]{8}\.[0-9]{1,15}")


class Feed:
    def __init__(self, core: Core, deployment: Deployment):
        self._core, self._base, self._router = core, deployment.base, deployment.router

    @property
    def _recent(self) -> RecentTurns:
        return self._core.orchestrator.services.recent

    def told(self, tenant: str, known: str = "") -> dict[str, Any]:
        """`known`: what the page has been told before, as `router.revision`, of several routers with commas between them; turns
        that it knows are left out. Raises InvalidInput."""
        recent = self._recent
        since = recent.since(tenant, revisions(known).get(recent.router, 0))
        return {
            "version": VERSION,
            "now": _rounded(time.time()),
            "router": {"id": recent.router, "routers": self._router.replicas, "revision": since.revision},
            "tenant": tenant,
            "ui": self._router.ui,
            "base": {"name": self._base.name, "model": Path(self._base.model).name[:NAME_CHARS]},
            "block_tokens": self._base.block_size,
            "decoders": [
                {"name": decoder.name, "pool": decoder.pool, "sharing": decoder.sharing, "kind": decoder.kind}
                for decoder in self._core.decoders.values()
            ],
            "pools": list(self._pools()),
            "turns": [_turn(turn) for turn in since.turns],
            "oldest": since.oldest,
        }

    def _pools(self) -> Iterator[dict[str, Any]]:
        """Prefill pools first; all in the order of the deployment file. `for`: the decode pools that draw on a prefill pool."""
        routes, admission = self._core.orchestrator.routes, self._core.orchestrator.services.admission
        draw: dict[str, list[str]] = {}
        for name, route in routes.items():
            if route.prefill:
                draw.setdefault(route.prefill.name, []).append(name)
        for name in (*draw, *routes):
            if name not in self._core.fleet.pools:  # it is being closed
                continue
            replicas = sorted(self._core.fleet.pools[name].replicas.members.values(), key=lambda replica: replica.id)
            yield {
                "pool": name,
                "role": "prefill" if name in draw else "decode",
                "for": draw.get(name, []),
                "waiting_turns": admission.waiting(name) if name in routes else 0,
                "replicas": [_replica(replica) for replica in replicas[:MOST_REPLICAS]],
                "unlisted_replicas": len(replicas[MOST_REPLICAS:]),
            }


def revisions(known: str) -> Mapping[str, int]:
    """Router -> revision."""
    parts = known.split(",") if known else []
    if len(parts) > MOST_ROUTERS or not all(_KNOWN.fullmatch(part) for part in parts):
        raise InvalidInput(
            "this is no list of revisions",
            field="known",
            fix=f"leave it out, or give at most {MOST_ROUTERS} like router.revision, with commas between them",
        )
    return {router: int(revision) for router, _, revision in (part.partition(".") for part in parts)}


def _replica(replica: Replica) -> dict[str, Any]:
    """As the replica last told, which it does once a second."""
    stats, health = replica.stats, replica.health
    return {
        "replica": replica.id,
        "usable": health.usable,
        "reason": health.reason or "",
        "calls": replica.total_active,
        "queued_tokens": replica.total_queued_tokens,
        "running": stats.running,
        "waiting": stats.waiting,
        "blocks_used": stats.blocks_used,
        "blocks_total": stats.blocks_total or replica.info.blocks_total,
        "preemptions": stats.preemptions,
        "stalled_s": _rounded(stats.stalled_s),
    }


def _turn(turn: RecentTurn) -> dict[str, Any]:
    """The usage has the names that clients know it by (TurnUsage.report)."""
    report = {name: _rounded(value) for name, value in turn.usage.report().items()}
    return {
        "number": turn.number,
        "lane": turn.lane,
        "session": turn.session,
        "request": turn.request_id,
        "decoder": turn.decoder,
        "pool": turn.pool,
        "began_at": _rounded(turn.began_at),
        "outcome": turn.outcome,
        "took_s": _rounded(turn.took_s),
        "queue_s": _rounded(turn.usage.queue_s),
        **report,
    }


def _rounded(value: float | int | str) -> float | int | str:
    return round(value, 4) if isinstance(value, float) else value
