"""How far long work has come, and when it is expected to end: bars on a terminal, plain lines where the output is a file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

#: Of the work done here, the last part by whose pace the rest is estimated: later epochs may be quicker than the first.
RECENT = 0.25
LEAST_STEPS = 5
#: A line is printed when this share has been done since the last one, but not within LEAST_S, and at the latest after MOST_S.
SHARE, LEAST_S, MOST_S = 0.02, 10.0, 300.0

Clock = Callable[[], float]


class Estimate:
    """Of the time until `total` is done. `completed`: done before, which says nothing of the pace here."""

    def __init__(self, total: float, completed: float = 0, clock: Clock = time.monotonic):
        self.total, self.completed, self._clock = total, completed, clock
        self.began_s = clock()
        self._first = completed
        self._seen = deque([(self.began_s, completed)])

    def done(self, completed: float) -> None:
        """So much is done now."""
        if completed <= self.completed:
            return
        self.completed = completed
        self._seen.append((self._clock(), completed))
        recent = max(LEAST_STEPS, RECENT * (completed - self._first))
        while len(self._seen) > 2 and self._seen[1][1] <= completed - recent:
            self._seen.popleft()

    @property
    def gone_s(self) -> float:
        return self._clock() - self.began_s

    def left_s(self) -> float | None:
        """None before anything is done."""
        (since_s, before), (until_s, after) = self._seen[0], self._seen[-1]
        if after == before:
            return None
        left = (self.total - after) * (until_s - since_s) / (after - before) - (self._clock() - until_s)
        return max(0.0, left)


class Progress(Protocol):
    """Of several tasks."""

    def add_task(self, what: str, total: int, completed: int = 0) -> int:
        """Returns the task's number."""

    def advance(self, task: int, count: int = 1) -> None: ...

    def update(self, task: int, completed: int, what: str) -> None:
        """`what`: what is being done, and how it goes."""

    def print(self, text: str) -> None:
        """A line that stays."""


@contextmanager
def shown(console: Console, clock: Clock = time.monotonic) -> Iterator[Progress]:
    if not console.is_terminal:
        yield Lines(console, clock)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), _Left())
    with RichProgress(*columns, console=console) as rich:
        yield Bars(rich, clock)


class Bars:
    def __init__(self, rich: RichProgress, clock: Clock):
        self._rich, self._clock = rich, clock
        self._estimates: dict[int, Estimate] = {}

    def add_task(self, what: str, total: int, completed: int = 0) -> int:
        estimate = Estimate(total, completed, self._clock)
        task = self._rich.add_task(what, total=total, completed=completed, estimate=estimate)
        self._estimates[task] = estimate
        return task

    def advance(self, task: int, count: int = 1) -> None:
        estimate = self._estimates[task]
        estimate.done(estimate.completed + count)
        self._rich.update(task, completed=estimate.completed)

    def update(self, task: int, completed: int, what: str) -> None:
        self._estimates[task].done(completed)
        self._rich.update(task, completed=completed, description=what)

    def print(self, text: str) -> None:
        self._rich.console.print(text, highlight=False, markup=False)


class _Left(ProgressColumn):
    """The time that is left. rich's own estimate needs several steps within half a minute."""

    max_refresh = 0.5

    def render(self, task: RichTask) -> Text:
        left_s = None if task.finished else task.fields["estimate"].left_s()
        return Text("" if left_s is None else f"{duration(left_s)} left", style="progress.remaining")


class Lines:
    def __init__(self, console: Console, clock: Clock):
        self._console, self._clock = console, clock
        self._tasks: list[_Line] = []

    def add_task(self, what: str, total: int, completed: int = 0) -> int:
        self._tasks.append(_Line(what, Estimate(total, completed, self._clock)))
        self.print(f"{what}: {total:,} to do" + (f", {completed:,} of them done before" if completed else ""))
        return len(self._tasks) - 1

    def advance(self, task: int, count: int = 1) -> None:
        self._tasks[task].estimate.done(self._tasks[task].estimate.completed + count)
        self._tell(self._tasks[task])

    def update(self, task: int, completed: int, what: str) -> None:
        self._tasks[task].what = what
        self._tasks[task].estimate.done(completed)
        self._tell(self._tasks[task])

    def print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _tell(self, line: _Line) -> None:
        if line.is_due():
            self.print(line.text())


class _Line:
    def __init__(self, what: str, estimate: Estimate):
        self.what, self.estimate = what, estimate
        self._told_s, self._told = 0.0, estimate.completed

    def is_due(self) -> bool:
        estimate, waited_s = self.estimate, self.estimate.gone_s - self._told_s
        is_end = estimate.completed >= estimate.total > self._told
        is_step = estimate.completed - self._told >= SHARE * estimate.total and waited_s >= LEAST_S
        if not (is_end or is_step or waited_s >= MOST_S):
            return False
        self._told_s, self._told = estimate.gone_s, estimate.completed
        return True

    def text(self) -> str:
        estimate = self.estimate
        share = f"{estimate.completed:,} of {estimate.total:,} ({estimate.completed / estimate.total:.0%})"
        text = f"{self.what}: {share}, {duration(estimate.gone_s)} gone"
        if estimate.completed >= estimate.total:
            return text
        left_s = estimate.left_s()
        return text + (f", about {duration(left_s)} left, until {_clock_time(left_s)}" if left_s is not None else "")


def duration(seconds: float) -> str:
    """Like 0:07, 12:34 and 101:02:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _clock_time(in_s: float) -> str:
    """When it will be so many seconds from now, with the day if that is not today."""
    now = datetime.now().astimezone()
    then = now + timedelta(seconds=in_s)
    return then.strftime("%H:%M" if then.date() == now.date() else "%H:%M on %Y-%m-%d")
