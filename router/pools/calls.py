"""Calls to the replicas of one Serve deployment; the caller chooses the replica."""

from __future__ import annotations

import asyncio

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from prefillshare.router.pools.own_calls import OwnCalls

#: Errors of a call that the replica's side causes: its process, Serve, or the transport in between.
CALL_ERRORS = (RayError, RayServeException, grpc.aio.AioRpcError)


class Calls:
    """`handle`: Serve's handle of the deployment."""

    def __init__(self, handle):
        self._app_handle = handle
        self._handle = handle.options(_by_reference=False)
        self._streams = handle.options(stream=True, _by_reference=False)

    def start(self) -> None:
        for handle in (self._app_handle, self._handle, self._streams):
            if not handle.is_initialized:
                handle._init()

    @property
    def deployment(self) -> tuple[str, str]:
        """Names of the application and of the deployment."""
        deployment = self._app_handle.deployment_id
        return deployment.app_name, deployment.name

    def on(self, replica: str) -> OwnCalls:
        """Calls that go to this replica."""
        return OwnCalls(self._handle.options(session_id=replica))

    def streaming_on(self, replica: str) -> OwnCalls:
        return OwnCalls(self._streams.options(session_id=replica))


async def answer(response):
    """Wait for a replica's answer. If the waiting task is cancelled, the call is cancelled, too."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
