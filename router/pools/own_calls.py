"""Calls to replicas that Serve does not cancel on behalf of their caller.

Serve takes every call that is made while it serves a request for a part of that request. When the client of an HTTP request has
gone, Serve cancels those calls first, and only then the task that waits for them. That task cannot tell this from a replica
that dropped its call. A call made here belongs to no request: only the task that made it, or the replica, can end it.

Seam: ray/serve/context.py (_serve_request_context), ray/serve/_private/replica.py (_on_request_cancelled)
"""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import replace

from ray.serve.context import _get_serve_request_context, _serve_request_context


class OwnCalls:
    """A Serve handle's methods: `calls.method.remote(...)`. The request's id for Serve's logs stays the same."""

    def __init__(self, handle):
        self._handle = handle

    def __getattr__(self, method: str) -> _OwnCall:
        return _OwnCall(getattr(self._handle, method))


class _OwnCall:
    def __init__(self, method):
        self._method = method

    def remote(self, *args, **kwargs):
        return copy_context().run(self._call, args, kwargs)

    def _call(self, args, kwargs):
        # If a call has no internal id, Serve gives it a new one, which belongs to no client's request.
        mine = replace(_get_serve_request_context(), _internal_request_id="", cancel_on_parent_request_cancel=False)
        _serve_request_context.set(mine)
        return self._method.remote(*args, **kwargs)
