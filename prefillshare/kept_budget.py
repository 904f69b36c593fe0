"""`prefillshare check`: how much may be kept, by the deployment file and the keys file, and where these do not fit together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.config.tree import Engines
from prefillshare.kvshare.contract import KVShape
from prefillshare.kvshare.decoders import ecache_layers, ecache_share
from prefillshare.router.tenants import Tenant

#: Policies of pools whose engines make base KV although there is a prefill pool.
_IN_PLACE = ("auto", "always")


def keepers(deployment: Deployment) -> list[tuple[Engines, int]]:
    """The engines that may keep contexts, with the number of layers whose inputs they keep beside the KV."""
    pools = [pool for pool in deployment.decode if pool.makes_base_kv]
    if not (prefill := deployment.shared_prefill):
        return [(pool, 0) for pool in pools]
    in_place = [(pool, 0) for pool in pools if pool.prefill_policy in _IN_PLACE]
    return [(prefill, len(ecache_layers(deployment.decode))), *in_place]


def capacity_tokens(deployment: Deployment, shape: KVShape) -> int:
    """Tokens whose KV these engines hold together, at the fewest replicas that they have."""
    per_token, tokens = shape.bytes_per_token(deployment.base.dtype), 0
    for engines, layers in keepers(deployment):
        of_layers = layers * ecache_share(deployment.base.model, shape) if layers else 0.0
        of_one = engines.kv_cache_gib * engines.tensor_parallel_size * 2**30 / (per_token * (1 + of_layers))
        tokens += engines.fewest_replicas * int(of_one)
    return tokens


def kept_budget(deployment: Deployment, shape: KVShape, tenants: Mapping[str, Tenant]) -> Iterator[str]:
    """Lines of text: first what all tenants together may keep, then warnings."""
    router = deployment.router
    allowed = most = int(router.max_kept_share * capacity_tokens(deployment, shape))
    if router.max_kept_tokens is not None:
        most = min(most, router.max_kept_tokens)
    yield f"kept contexts: at most {most:,} tokens of all tenants together"
    if (router.max_kept_tokens or 0) > allowed:
        yield (
            f"warning: router.max_kept_tokens is {router.max_kept_tokens:,}, and router.max_kept_share allows {allowed:,}: "
            "raise the share or kv_cache_gib, or lower it"
        )
    own = {name: tenant.max_kept_tokens for name, tenant in tenants.items() if tenant.max_kept_tokens is not None}
    if too_much := sorted(name for name, tokens in own.items() if tokens > most):
        yield f"warning: max_kept_tokens of {', '.join(too_much)} is more than all tenants together may keep"
    elif sum(own.values()) > most:
        yield (
            f"warning: the tenants' max_kept_tokens add up to {sum(own.values()):,}: not all of them can keep as much as they "
            "may at once"
        )
