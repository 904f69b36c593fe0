"""What answers at the address of a Ray cluster, and which clusters have nodes on this machine.

It is asked before Ray is: Ray itself waits for minutes for a cluster that does not answer.

Seam: ray/_private/grpc_utils.py (`init_grpc_channel`), ray/_private/services.py (`find_gcs_addresses`), ray/core/generated (the
services of Ray's control store and of its client's server)
"""

from __future__ import annotations

import os
import re

from prefillshare.kvshare.errors import ConfigError

#: Seconds within which a cluster has to answer.
ANSWER_S = 5.0
TOKEN_FIX = (
    "give the cluster's token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token), and the address of a Ray head"
    " of this version"
)
_ADDRESS_FIX = "see whether it runs, or give the address of another Ray cluster; the router's HTTP and gRPC ports are none"


def from_environment() -> str | None:
    """RAY_ADDRESS, which Ray's own commands heed as well."""
    return os.environ.get("RAY_ADDRESS") or None


def only_one(field: str | None = None) -> str:
    """The address in the environment, or that of the only cluster on this machine. Raises ConfigError if there is none, or
    several."""
    if told := from_environment():
        return told
    match on_this_machine():
        case [one]:
            return one
        case []:
            raise ConfigError("no Ray cluster runs on this machine", field=field, fix="start one, or give its address")
        case several:
            message = f"{len(several)} Ray clusters run on this machine: {', '.join(several)}"
            raise ConfigError(message, field=field, fix="give one of these addresses")


def named(address: str) -> tuple[str, int] | None:
    """Host and port in an address, or None."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d+)", address)
    return (found[1], int(found[2])) if found else None


def on_this_machine() -> list[str]:
    """Addresses of the clusters that have a node here."""
    from ray._private import services

    services.find_gcs_addresses.cache_clear()
    return sorted(services.find_gcs_addresses())


def check(address: str, field: str | None = None) -> None:
    """Raises ConfigError, which names `field`, unless a Ray cluster that lets this user in answers within ANSWER_S."""
    import grpc
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.grpc_utils import init_grpc_channel

    if (where := named(address)) is None:
        raise ConfigError(f"{address!r} is no address", field=field, fix="give HOST:PORT, or ray://HOST:PORT")
    # Ray does this itself only for clusters that it finds by itself.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    at = address.removeprefix("ray://")
    with init_grpc_channel(at, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]) as channel:
        try:
            _ask(channel, is_client=address.startswith("ray://"))
        except grpc.RpcError as error:
            raise _error(error.code(), f"{error.details()}", at, field) from None
    if not address.startswith("ray://") and not on_this_machine():
        raise ConfigError(
            f"no node of the Ray cluster at {at} runs on this machine",
            field=field,
            fix=f"run this on a machine of the cluster, or give the head's port for clients: ray://{where[0]}:10001",
        )


def _ask(channel, is_client: bool) -> None:
    if is_client:
        from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

        stub = ray_client_pb2_grpc.RayletDriverStub(channel)
        request = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING)
        stub.ClusterInfo(request, timeout=ANSWER_S)
    else:
        from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        stub.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=ANSWER_S)


def _error(code, details: str, address: str, field: str | None) -> ConfigError:
    from grpc import StatusCode

    if code is StatusCode.DEADLINE_EXCEEDED:
        return ConfigError(f"nothing answers at {address} within {ANSWER_S:g} s", field=field, fix=_ADDRESS_FIX)
    if code is StatusCode.UNAVAILABLE and "HTTP/2" in details:
        return ConfigError(f"what answers at {address} is no Ray cluster", field=field, fix=_ADDRESS_FIX)
    if code is StatusCode.UNAVAILABLE:
        why = details.rpartition(": ")[2].rstrip("]") or "it does not speak Ray's protocol"
        return ConfigError(f"no Ray cluster answers at {address}: {why}", field=field, fix=_ADDRESS_FIX)
    if code in (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED):
        return ConfigError(f"the Ray cluster at {address} does not let this user in", field=field, fix=TOKEN_FIX)
    return ConfigError(f"what answers at {address} is no Ray cluster ({code.name})", field=field, fix=_ADDRESS_FIX)
