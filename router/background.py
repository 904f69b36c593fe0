"""Background work that no turn waits for. Its failures are logged and counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from functools import partial

from prefillshare.kvshare.metrics import Metrics

logger = logging.getLogger(__name__)


class Background:
    """Owns its tasks until they end, at the latest at `stop`. A task that raises is logged and counted."""

    def __init__(self, metrics: Metrics | None = None):
        self._failures = metrics["background_failures_total"] if metrics is not None else None
        self._running: set[asyncio.Task] = set()

    def start(self, what: str, work: Coroutine, **whose: object) -> asyncio.Task:
        """Run `work` as a task. `what`: the metric's label. `whose`: the session, request or replica that the log names."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(partial(self._ended, what, whose))
        return task

    async def stop(self) -> None:
        """Cancel the tasks that still run and wait for them."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self, what: str, whose: dict[str, object], task: asyncio.Task) -> None:
        self._running.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self._failures is not None:
            self._failures.labels(what).inc()
        of = ", ".join(f"{kind} {name}" for kind, name in whose.items())
        logger.error("%s failed in the background (%s)", what, of, exc_info=error, extra={k: str(v) for k, v in whose.items()})
