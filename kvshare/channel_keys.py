"""Keys of the ZMQ channels between engines and routers: KV events, their replays, and NIXL's handshakes.

The channels are encrypted and authenticated with CURVE. Every process derives the same server key pair from one secret of
the deployment, so no key is ever sent. A server answers only clients that have its public key, and only holders of the secret
can derive that key: a client without it learns nothing, and nobody can impersonate a server.

The secret is kept in the environment of the processes that need it (an engine's own process inherits it), and nowhere else:
not in settings, arguments or logs. Without a secret the channels are not encrypted, which is allowed on loopback only
(kvshare_vllm/engine/ray_node.py).

CURVE: https://rfc.zeromq.org/spec/26/
"""

from __future__ import annotations

import hashlib
import hmac
import os

import zmq
from zmq.utils import z85

from prefillshare.kvshare.errors import ConfigError

#: 64 hexadecimal digits.
ENVIRONMENT = "PREFILLSHARE_CHANNEL_SECRET"

_SALT, _CHANNELS, _SERVER = b"prefillshare 1", b"channels", b"server key pair"


def derive_secret(token: str) -> str:
    """The channels' secret, from a token that every process of the deployment has. It does not reveal the token."""
    return _expand(hmac.digest(_SALT, token.encode(), "sha256"), _CHANNELS).hex()


def use(secret: str) -> None:
    """Protect the channels of this process, and of the processes that it starts, from now on."""
    os.environ[ENVIRONMENT] = secret


def protect(channel: zmq.Socket, *, server: bool) -> zmq.Socket:
    """Give a socket its keys before it binds or connects; `server`: the side that binds. Returns the socket.

    Leaves it as it is if the process has no secret. Raises ConfigError if the secret is malformed."""
    secret = os.environ.get(ENVIRONMENT)
    if not secret:
        return channel
    try:
        private = z85.encode(_expand(bytes.fromhex(secret), _SERVER))
    except ValueError:
        raise ConfigError(f"{ENVIRONMENT} is not hexadecimal", fix="leave it to prefillshare, which sets it") from None
    public = zmq.curve_public(private)
    if server:
        channel.curve_server = True
        channel.curve_secretkey, channel.curve_publickey = private, public
    else:
        channel.curve_serverkey = public
        channel.curve_publickey, channel.curve_secretkey = zmq.curve_keypair()
    return channel


def _expand(key: bytes, purpose: bytes) -> bytes:
    """32 bytes: one block of HKDF's expansion (RFC 5869)."""
    return hmac.digest(key, purpose + b"\x01", hashlib.sha256)
