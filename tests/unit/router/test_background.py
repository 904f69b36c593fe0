"""Work behind turns: what becomes of it is logged and counted."""

import asyncio
import logging

import pytest

from prefillshare.kvshare.errors import Unavailable
from prefillshare.router.background import Background, Periodic


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


async def test_periodic_work_goes_on_whatever_it_raises_until_it_is_stopped(caplog):
    done, fourth, failures = [], asyncio.Event(), [Unavailable("gone for now"), ValueError("broken")]

    async def work():
        done.append(1)
        if len(done) <= len(failures):
            raise failures[len(done) - 1]
        if len(done) == 4:
            fourth.set()
            await asyncio.Event().wait()

    periodic = Periodic("nothing is counted", work, 0.001, spread=0.5)
    await asyncio.wait_for(fourth.wait(), 60)
    await asyncio.wait_for(periodic.stop(), 60)
    assert len(done) == 4
    told = [(record.levelname, record.getMessage(), bool(record.exc_info)) for record in caplog.records]
    assert told == [("WARNING", "nothing is counted: gone for now", False), ("ERROR", "nothing is counted", True)]


@pytest.mark.parametrize(("later", "times"), [(False, 1), (True, 0)])
async def test_periodic_work_is_done_at_once_or_after_a_period(later, times):
    done = []

    async def work():
        done.append(1)

    periodic = Periodic("-", work, 3600, later=later)
    for _ in range(3):
        await asyncio.sleep(0)
    await periodic.stop()
    assert len(done) == times
