"""`serve` notices when what it started is gone or does not come back, and says why."""

import threading
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from prefillshare import app, cli, watch
from prefillshare.argument_check import Checked
from prefillshare.kvshare.errors import Unavailable
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


def status(state, *unwell):
    """What Serve says of the application; `state` None: it does not know it."""
    parts = {name: SimpleNamespace(status=SimpleNamespace(value="UNHEALTHY"), message="it died") for name in unwell}
    parts["prefill"] = SimpleNamespace(status=SimpleNamespace(value="HEALTHY"), message="")
    one = SimpleNamespace(status=SimpleNamespace(value=state), message="", deployments=parts)
    return SimpleNamespace(applications={} if state is None else {"prefillshare": one})


@pytest.mark.parametrize(
    ("told", "text", "patience_s"),
    [
        (status("RUNNING"), None, None),
        (status("DEPLOYING", "agents"), None, None),
        (status("UNHEALTHY", "agents"), "its application is unhealthy: agents: it died", 300.0),
        (status("DEPLOY_FAILED", "router"), "its application is deploy_failed: router: it died", PATIENCE_S),
        (status("DELETING"), "its application is deleting", PATIENCE_S),
        (status(None), "gone from Ray Serve", 5.0),
    ],
)
def test_what_serve_says_of_the_application_is_read_right(monkeypatch, told, text, patience_s):
    monkeypatch.setattr("ray.serve.status", lambda: told)
    trouble = watch._trouble(300.0)
    if text is None:
        assert trouble is None
    else:
        assert text in trouble.text
        assert trouble.patience_s == patience_s


def test_serve_ends_with_a_status_and_the_reason_when_its_application_is_gone(monkeypatch, tmp_path, model):
    base = model("base")
    file = tmp_path / "d.yaml"
    file.write_text(f"base: {{model: {base}}}\ndecode: [{{pool: d, model: {base}, sharing: none}}]\n")
    ended = []

    @contextmanager
    def running(deployment, progress):
        try:
            yield
        finally:
            ended.append(deployment)

    monkeypatch.setattr(app, "running", running)
    monkeypatch.setattr(app, "check_arguments", lambda deployment: Checked(warnings=("the template ignores [tools]",)))
    monkeypatch.setattr(watch, "ASK_S", 0.01)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    gone = partial(Trouble, "its application is gone from Ray Serve", 0.0)
    monkeypatch.setattr(app, "Watch", lambda restart_s, stop: Watch(restart_s, stop, ask=gone))
    result = CliRunner().invoke(cli.app, ["serve", str(file)])
    assert result.exit_code == 2
    assert "does not serve any more: its application is gone from Ray Serve" in result.stderr
    assert "warning  the template ignores [tools]" in result.stderr
    assert len(ended) == 1
