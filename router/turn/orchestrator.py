"""Makes turns, and holds what is served now and what all turns of the router have in common."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.config import Base, Router
from prefillshare.kvshare.decoders import Decoder
from prefillshare.kvshare.errors import NotFound, Unavailable
from prefillshare.kvshare.metrics import Metrics
from prefillshare.kvshare_vllm.surface.turn_call import TurnCall
from prefillshare.router import clock
from prefillshare.router.accounts.accounts import Accounts
from prefillshare.router.admission.admission import Admission, PoolSource
from prefillshare.router.admission.grant import TenantShare
from prefillshare.router.pools.route import Route
from prefillshare.router.service_rate import MeanRatio
from prefillshare.router.telemetry.recent_turns import RecentTurns, kept_per_tenant
from prefillshare.router.turn.decider import Decider
from prefillshare.router.turn.in_progress import InProgress
from prefillshare.router.turn.layer_choice import LayerChoice
from prefillshare.router.turn.metrics import TurnMetrics
from prefillshare.router.turn.releases import Releases
from prefillshare.router.turn.services import Services
from prefillshare.router.turn.turn import Turn


class Orchestrator:
    """`tenants`: what each tenant may ask of the queue; a tenant that is not in it is treated as NOBODY. `accounts`: by default
    in memory, without KV."""

    def __init__(
        self,
        config: Router,
        base: Base,
        decoders: dict[str, Decoder],
        routes: Mapping[str, Route],
        metrics: Metrics,
        tenants: Mapping[str, TenantShare] = MappingProxyType({}),
        load_timeout_s: float = 30.0,
        accounts: Accounts | None = None,
    ):
        #: Changed in place: surfaces hold it too.
        self.decoders = decoders
        self.routes, self.draining = routes, False
        self.services = Services(
            config=config,
            block_size=base.block_size,
            load_timeout_s=load_timeout_s,
            admission=Admission(config, base.block_size, self._sources(), metrics),
            accounts=accounts or Accounts.in_memory(metrics, base.block_size),
            in_progress=InProgress(metrics),
            releases=Releases(metrics),
            layer_choice=LayerChoice(),
            decider=Decider(),
            counted=TurnMetrics(metrics, base.block_size),
            compute_s=MeanRatio(clock.now),
            recent=RecentTurns(0 if config.ui == "off" else kept_per_tenant(len(tenants))),
            tenants=tenants,
        )
        self._watch_capacity()

    def serve(self, decoders: Mapping[str, Decoder], routes: Mapping[str, Route], config: Router) -> None:
        """Serve these from now on. Turns in progress keep the route they started on."""
        self.decoders.clear()
        self.decoders.update(decoders)
        self.routes, self.services.config = routes, config
        self.services.admission.serve(config, self._sources())
        self._watch_capacity()

    def turn(self, call: TurnCall) -> Turn:
        """Raises as `admit` does."""
        self.admit(call.decoder)
        decoder = self.decoders[call.decoder]
        return Turn(self.services, call, decoder, self.routes[decoder.pool])

    def admit(self, decoder: str | None, turns: int = 1, logprobs: int | None = None) -> None:
        """Check a request before any of its turns is made. Raises NotFound, InvalidInput for more turns than there is ever room
        for or more log-probabilities than the decoder's engines return, Unavailable while stopping. A `decoder` of None is not
        checked."""
        self.services.admission.check_turns(turns, self.services.share_of(current_caller.get().tenant))
        if decoder is not None and decoder not in self.decoders:
            raise NotFound(f"unknown decoder {decoder!r}", field="decoder", fix=f"use one of {', '.join(self.decoders)}")
        if decoder is not None:
            self.decoders[decoder].check_logprobs(logprobs)
        if self.draining:
            raise Unavailable("the router is stopping", fix="try again; another replica or its successor takes over")

    async def drain(self, timeout_s: float) -> None:
        """Admit no further turn and wait until running ones have ended, at most `timeout_s`."""
        self.draining = True
        await self.services.in_progress.ended(None, timeout_s)

    def _sources(self) -> dict[str, PoolSource]:
        policies = {decoder.pool: decoder.local_prefill for decoder in self.decoders.values()}
        return {
            name: PoolSource(
                route.decode.capacity,
                route.makers.name,
                lambda pool=route.makers: len(pool.replicas.usable()),
                partial(_local_replicas, route, policies.get(name)),
            )
            for name, route in self.routes.items()
        }

    def _watch_capacity(self) -> None:
        for route in self.routes.values():
            route.decode.replicas.on_change = route.makers.replicas.on_change = self.services.admission.refresh


def _local_replicas(route: Route, policy: str | None) -> int:
    """Decode replicas that may prefill beside a prefill pool's (decider.py)."""
    if route.prefill is None or policy is None or (policy == "never" and route.prefill.replicas.usable()):
        return 0
    return len(route.decode.replicas.usable())
