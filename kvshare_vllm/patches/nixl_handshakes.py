"""NIXL's handshakes are encrypted, and only holders of the deployment's key get an answer (kvshare/channel_keys.py).

An engine that reads KV asks the engine that holds it for its memory's addresses, over a ZMQ side channel that vLLM opens to
everybody. All of vLLM's NIXL connectors, the stock one included, make the sockets of both sides in one function.

Seam: vllm/distributed/kv_transfer/kv_connector/v1/nixl/utils.py (`zmq_ctx` calls `make_zmq_socket`)

Goes when: vLLM's side channel can be given a key.
"""

from __future__ import annotations

import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import utils

from prefillshare.kvshare import channel_keys


class _Protecting:
    """Takes the place of a ZMQ context: its sockets have their keys before they bind or connect."""

    def __init__(self, context: zmq.Context, server: bool):
        self._context, self._server = context, server

    def socket(self, kind: int) -> zmq.Socket:
        return channel_keys.protect(self._context.socket(kind), server=self._server)


def protect() -> None:
    """From now on, protect the handshakes of this process. May be called again."""
    stock = utils.make_zmq_socket
    if hasattr(stock, "protects"):
        return

    def make_zmq_socket(ctx: zmq.Context, path: str, socket_type: int, bind: bool) -> zmq.Socket:
        return stock(ctx=_Protecting(ctx, server=bind), path=path, socket_type=socket_type, bind=bind)

    make_zmq_socket.protects = True
    utils.make_zmq_socket = make_zmq_socket
