"""What a replica takes from the Ray node that it runs on: the address it listens on, and the key of its channels.

A replica listens where the node's Ray processes do. A deployment whose surfaces are on loopback starts Ray there too
(prefillshare/local_ray.py), so that nothing of it can be reached from another machine. Elsewhere the channels between engines
and routers carry prompts over the network: they are protected by a key that comes from Ray's authentication token, which
every process of the cluster has.

Seam: ray/_private/authentication; ray/serve/_private/replica.py (`add_port_to_grpc_server`, which binds "[::]")
"""

from __future__ import annotations

import ray

from prefillshare.kvshare import channel_keys
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.loopback import ADDRESS, is_loopback


def join() -> str:
    """Called in every replica's process before anything of it listens. Returns the address to listen on.

    Raises ConfigError if other machines could reach it and there is no key."""
    if secret := channel_secret():
        channel_keys.use(secret)
    address = ray.util.get_node_ip_address()
    if is_loopback(address):
        _keep_serve_on_loopback()
    return address


def channel_secret() -> str | None:
    """The secret of the deployment's channels, made from Ray's token; None where Ray asks for no token and is on loopback.

    Raises ConfigError where Ray asks for no token and other machines reach it."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._raylet import AuthenticationTokenLoader

    if is_token_auth_enabled():
        return channel_keys.derive_secret(AuthenticationTokenLoader.instance().get_raw_token())
    if is_loopback(ray.util.get_node_ip_address()):
        return None
    raise ConfigError(
        "Ray's authentication is off in this cluster: whoever reaches its ports could run programs in it and read prompts",
        field="cluster.address",
        fix="start Ray with RAY_AUTH_MODE=token on every machine, with the same token (ray get-auth-token --generate)",
    )


def _keep_serve_on_loopback() -> None:
    """Bind Serve's port for calls between replicas to loopback. Serve opens it on all addresses, after the constructor."""
    from ray.serve._private import replica

    stock = replica.add_port_to_grpc_server
    if hasattr(stock, "keeps_to_loopback"):
        return

    def add_port(server, address: str) -> int:
        return stock(server, address.replace("[::]:", f"{ADDRESS}:"))

    add_port.keeps_to_loopback = True
    replica.add_port_to_grpc_server = add_port
