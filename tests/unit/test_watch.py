"""`serve` notices when what it started is gone or does not come back, and says why."""

import threading

import pytest

from kvshare.errors import Unavailable
from prefillshare.watch import PATIENCE_S, Trouble, Watch


class Watched:
    """A watch whose clock and answers the test sets."""

    def __init__(self):
        self.now, self.answer, self.ended = 0.0, None, threading.Event()
        self.watch = Watch(300.0, self.ended, ask=self._ask, clock=lambda: self.now)

    def _ask(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def after(self, seconds, answer, asked=True):
        self.now, self.answer = self.now + seconds, answer
        if asked:
            self.watch.ask()
        self.watch.look()
        return self.ended.is_set()


@pytest.fixture
def watched():
    return Watched()


def test_what_serves_goes_on(watched):
    assert not watched.after(10_000, None)
    watched.watch.check()


def test_what_is_gone_is_told_with_its_reason(watched):
    gone = Trouble("its application is gone", 5)
    assert not watched.after(4, gone)
    assert watched.after(2, gone)
    with pytest.raises(Unavailable, match=r"does not serve any more: its application is gone \(for 6 s\)"):
        watched.watch.check()


def test_what_comes_back_in_time_is_not_gone(watched):
    for _ in range(3):
        assert not watched.after(250, Trouble("unhealthy", 300))
        assert not watched.after(1, None)


@pytest.mark.parametrize("asked", [True, False])
def test_a_cluster_that_does_not_answer_or_hangs_in_the_question_is_gone(watched, asked):
    watched.watch.ask()
    assert not watched.after(PATIENCE_S - 1, ConnectionError("no controller"), asked)
    assert watched.after(2, ConnectionError("no controller"), asked)
    with pytest.raises(Unavailable, match="Ray Serve does not answer"):
        watched.watch.check()


def test_the_reason_is_the_first_and_stays(watched):
    watched.after(6, Trouble("deleted", 5))
    watched.after(1, None)
    with pytest.raises(Unavailable, match="deleted"):
        watched.watch.check()


def test_its_threads_end_with_it():
    ended = threading.Event()
    with Watch(1.0, ended, ask=lambda: None):
        assert "watch" in {thread.name for thread in threading.enumerate()}
    assert "watch" not in {thread.name for thread in threading.enumerate()}
