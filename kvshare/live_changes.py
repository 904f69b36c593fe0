"""What of a deployment routers take over while they run, and what replaces them."""

from __future__ import annotations

from kvshare.config import Deployment, Router


def fixed_for_router(deployment: Deployment) -> object:
    """What a running router cannot take over: it is replaced when this changes, turn by turn."""
    router = deployment.router.model_dump(exclude=set(Router.CHANGEABLE) | {"replicas"})
    return deployment.base, deployment.cluster.kv_load_timeout_s, deployment.logs.format, deployment.tracing, router


def taken_over(running: Deployment, wanted: Deployment) -> Deployment:
    """What a router that runs `running` serves when it is told to serve `wanted`: what is fixed stays as it was."""
    changeable = {name: getattr(wanted.router, name) for name in (*Router.CHANGEABLE, "replicas")}
    return wanted.model_copy(update={
        "base": running.base,
        "router": running.router.model_copy(update=changeable),
        "cluster": wanted.cluster.model_copy(update={"kv_load_timeout_s": running.cluster.kv_load_timeout_s}),
        "logs": wanted.logs.model_copy(update={"format": running.logs.format}),
        "tracing": running.tracing,
    })  # fmt: skip
