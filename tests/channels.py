"""Which processes listen on which addresses, and which clients they answer."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import psutil
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG
from zmq.utils.monitor import recv_monitor_message

from prefillshare.kvshare import channel_keys

#: Longest wait, in seconds, for an answer or for being turned away.
LIMIT_S = 20
#: What an engine asks another one from which it wants to read.
HANDSHAKE = msgspec.msgpack.encode((GET_META_MSG, 0, 0))
#: What a router asks an engine that it begins to follow.
REPLAY = (b"", (0).to_bytes(8, "big"))

_ENDED = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


@dataclass(frozen=True)
class Listener:
    address: str
    port: int
    process: str

    @property
    def on_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def listeners(process: psutil.Process) -> Iterator[Listener]:
    """TCP ports that accept connections, and UDP ports that accept data from anywhere, of a process and all its descendants."""
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go
            name = " ".join(one.cmdline()).split("  ")[0][:80]
            for found in one.net_connections("inet"):
                if found.status == psutil.CONN_LISTEN or (found.type == socket.SOCK_DGRAM and not found.raddr):
                    yield Listener(found.laddr.ip, found.laddr.port, name)


def turned_away(kind: int, endpoint: str, ask: Sequence[bytes] = ()) -> bool:
    """Whether the server disconnects a socket that has this process's current keys, without sending it anything."""
    with zmq.Context() as context, context.socket(kind) as client:
        client.linger = 0
        if kind == zmq.SUB:
            client.subscribe(b"")
        channel_keys.protect(client, server=False)
        with client.get_monitor_socket(_ENDED | zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
            client.connect(endpoint)
            if ask:
                client.send_multipart(ask)
            assert monitor.poll(LIMIT_S * 1000), "neither served nor turned away"
            happened = recv_monitor_message(monitor)["event"]
            return happened != zmq.EVENT_HANDSHAKE_SUCCEEDED and not client.poll(0)
