"""Work behind turns: what becomes of it is logged and counted."""

import asyncio
import logging

from prefillshare.router.background import Background


def failures(metrics) -> float:
    return metrics["background_failures_total"].labels("canary")._value.get()


async def test_a_task_that_raises_is_counted_and_logged_with_whose_it_was(metrics, caplog):
    async def work():
        raise ZeroDivisionError("unforeseen")

    task = Background(metrics).start("canary", work(), session=("research", "mine"))
    await asyncio.wait({task})
    await asyncio.sleep(0)
    assert failures(metrics) == 1
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "canary" in record.getMessage()
    assert "mine" in record.getMessage()
    assert "unforeseen" in caplog.text
    assert "mine" in record.session


async def test_tasks_that_end_well_or_are_stopped_are_no_failures(metrics):
    background, ended = Background(metrics), []

    async def work(seconds):
        try:
            await asyncio.sleep(seconds)
        finally:
            ended.append(seconds)

    await background.start("canary", work(0))
    background.start("canary", work(60))
    await asyncio.sleep(0)
    await background.stop()
    assert ended == [0, 60]
    assert failures(metrics) == 0
