"""Background work that no turn waits for: what is done once, and what is done again and again."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial

from prefillshare.kvshare.errors import PrefillShareError
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


class Periodic:
    """Does `work` now and every `period_s` seconds, whatever it raises, until `stop`. Owns the task that `stop` joins.

    `what`: what the log says has not happened if it raises. `later`: the first time is after a period. `spread`: share by which
    periods vary, so that routers do not all work at once.
    """

    def __init__(
        self, what: str, work: Callable[[], Awaitable[None]], period_s: float, *, later: bool = False, spread: float = 0.0
    ):
        self._what, self._work, self._period_s, self._spread = what, work, period_s, spread
        self._task = asyncio.create_task(self._run(later))

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self, later: bool) -> None:
        if not later:
            await self._try()
        while True:
            await asyncio.sleep(self._period_s * random.uniform(1 - self._spread, 1 + self._spread))
            await self._try()

    async def _try(self) -> None:
        try:
            await self._work()
        except PrefillShareError as error:
            logger.warning("%s: %s", self._what, error)
        except Exception:
            logger.exception("%s", self._what)
