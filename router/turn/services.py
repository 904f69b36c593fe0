"""What all turns of a router have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefillshare.kvshare.config import Router
from prefillshare.router.accounts.accounts import Accounts
from prefillshare.router.admission.admission import Admission
from prefillshare.router.admission.grant import NOBODY, TenantShare
from prefillshare.router.service_rate import MeanRatio
from prefillshare.router.telemetry.recent_turns import RecentTurns
from prefillshare.router.turn.decider import Decider
from prefillshare.router.turn.in_progress import InProgress
from prefillshare.router.turn.layer_choice import LayerChoice
from prefillshare.router.turn.metrics import TurnMetrics
from prefillshare.router.turn.releases import Releases


@dataclass
class Services:
    """`config` changes while the router runs."""

    config: Router
    block_size: int
    #: Seconds that a decode call may take to its first token.
    load_timeout_s: float
    admission: Admission
    #: What tenants have used, and how much they may use a minute.
    accounts: Accounts
    in_progress: InProgress
    releases: Releases
    layer_choice: LayerChoice
    decider: Decider
    counted: TurnMetrics
    #: Seconds per token that the shared pool has lately computed.
    compute_s: MeanRatio
    recent: RecentTurns
    #: What each tenant may ask of the queue; a tenant that is not in it is treated as NOBODY.
    tenants: Mapping[str, TenantShare]

    def share_of(self, tenant: str) -> TenantShare:
        return self.tenants.get(tenant, NOBODY)
