"""Long work says how far it has come and when it will end, on a terminal and where the output is a file."""

from __future__ import annotations

import io
import re
from datetime import datetime

import pytest
from rich.console import Console

from prefillshare.finetuning import progress as progress_module
from prefillshare.finetuning.log import training_progress
from prefillshare.finetuning.progress import Estimate, duration, shown


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock():
    return Clock()


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)


def row(step: int, loss: float = 1.5, validation: float | None = None) -> dict:
    return {"step": step, "epoch": 1, "loss": loss, "tokens_per_s": 512.0, "validation_loss": validation}


def test_the_time_left_follows_the_pace_of_what_was_done_here(clock):
    estimate = Estimate(100, 20, clock)
    assert estimate.left_s() is None
    for step in range(21, 41):
        clock.sleep(10)
        estimate.done(step)
    assert estimate.left_s() == pytest.approx(600)
    clock.sleep(4)
    assert estimate.left_s() == pytest.approx(596)
    assert estimate.gone_s == 204


def test_what_was_slow_at_first_is_forgotten(clock):
    """The base's KV is computed in the first epoch only."""
    estimate = Estimate(1000, 0, clock)
    for step in range(1, 501):
        clock.sleep(60 if step <= 250 else 1)
        estimate.done(step)
    assert estimate.left_s() == pytest.approx(500, rel=0.01)


def test_a_step_that_takes_longer_than_expected_does_not_end_in_the_past(clock):
    estimate = Estimate(10, 0, clock)
    clock.sleep(10)
    estimate.done(9)
    clock.sleep(500)
    assert estimate.left_s() == 0


def lines_of(work, terminal: bool = False) -> list[str]:
    to = console(terminal)
    work(to)
    return to.file.getvalue().splitlines()


def test_where_there_is_no_terminal_training_is_told_in_plain_lines_with_the_time_it_will_end(clock):
    def train(to):
        with training_progress(to, 400, 40, clock) as show:
            for step in range(41, 401):
                clock.sleep(3)
                show(row(step, validation=1.25 if step == 400 else None))

    first, *rest, last, validation = lines_of(train)
    assert first == "training: 400 to do, 40 of them done before"
    told, _, until = rest[0].partition(", until ")
    assert told == "epoch 1, loss 1.5000, 512 tokens/s: 48 of 400 (12%), 0:24 gone, about 17:36 left"
    assert re.fullmatch(r"\d\d:\d\d( on \d{4}-\d\d-\d\d)?", until)
    assert last == "epoch 1, loss 1.5000, 512 tokens/s: 400 of 400 (100%), 18:00 gone"
    assert validation == "epoch 1: validation loss 1.2500"
    assert len(rest) == 44  # one every 8 of 400, but the last
    assert not any("\x1b" in line or "\r" in line for line in [first, *rest, last])


def test_lines_are_neither_many_nor_far_apart(clock):
    def quick(to):
        with shown(to, clock) as progress:
            task = progress.add_task("arithmetic", 1000)
            for _ in range(1000):
                clock.sleep(0.01)
                progress.advance(task)

    def slow(to):
        with shown(to, clock) as progress:
            task = progress.add_task("steps", 10_000)
            for _ in range(100):
                clock.sleep(60)
                progress.advance(task)

    assert lines_of(quick) == ["arithmetic: 1,000 to do", "arithmetic: 1,000 of 1,000 (100%), 0:10 gone"]
    assert len(lines_of(slow)) == 1 + 100 * 60 // 300


def test_the_day_is_told_if_it_ends_on_another():
    text = progress_module._clock_time(86_400 * 3)
    assert re.fullmatch(r"\d\d:\d\d on \d{4}-\d\d-\d\d", text)
    assert datetime.fromisoformat(text.split()[-1]) > datetime.now()


def test_on_a_terminal_there_is_a_bar_that_knows_the_time_left_of_slow_steps_too(clock):
    """rich's own estimate needs several steps within half a minute."""

    def train(to):
        with training_progress(to, 10, 0, clock) as show:
            for step in range(1, 5):
                clock.sleep(120)
                show(row(step))

    (last,) = [line for line in lines_of(train, terminal=True) if "4/10" in line][-1:]
    assert "epoch 1, loss 1.5000, 512 tokens/s" in last
    assert "12:00 left" in last


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (754, "12:34"), (363_723, "101:02:03")])
def test_durations(seconds, text):
    assert duration(seconds) == text
