"""Waiting until what was deployed runs, by what Serve says of it."""

from types import SimpleNamespace

import pytest
from ray import serve

from prefillshare import app
from prefillshare.kvshare.errors import EngineStartError

DEPLOYMENT = SimpleNamespace(cluster=SimpleNamespace(start_timeout_s=100.0))


@pytest.fixture
def says(monkeypatch):
    """Sets what Serve says, one look after the other: the application's state, and those of agents, prefill and the router.
    Returns how many of them are left."""
    clock = [0.0]
    monkeypatch.setattr(app.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(app.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + 60))
    left = []

    def status():
        whole, *parts = left.pop(0)
        deployments = {
            name: SimpleNamespace(status=SimpleNamespace(value=state), message=f"{name} is ill")
            for name, state in zip(("agents", "prefill", "router"), parts, strict=True)
        }
        state = SimpleNamespace(status=SimpleNamespace(value=whole), deployments=deployments, message="all of it")
        return SimpleNamespace(applications={app.APP: state})

    monkeypatch.setattr(serve, "status", status)

    def say(*looks):
        left.extend(looks)
        return left

    return say


WELL = ("RUNNING", "HEALTHY", "HEALTHY", "HEALTHY")
CHANGING = ("DEPLOYING", "UPDATING", "HEALTHY", "HEALTHY")


def test_it_waits_until_all_runs(says):
    left = says(CHANGING, WELL)
    app.wait_until_running(DEPLOYMENT, None)
    assert not left


@pytest.mark.parametrize("state", ["UNHEALTHY", "DEPLOY_FAILED"])
def test_what_breaks_meanwhile_is_named(says, state):
    says(CHANGING, (state, "HEALTHY", state, "HEALTHY"))
    with pytest.raises(EngineStartError, match="prefill: prefill is ill"):
        app.wait_until_running(DEPLOYMENT, None)


def test_what_was_ailing_before_is_not_waited_for_but_all_else_is(says):
    says(("UNHEALTHY", "HEALTHY", "UNHEALTHY", "HEALTHY"))
    ailing = app.ailing()
    assert ailing == {"prefill"}
    left = says(
        ("UNHEALTHY", "UPDATING", "UNHEALTHY", "HEALTHY"),
        ("UNHEALTHY", "HEALTHY", "UNHEALTHY", "HEALTHY"),
    )
    app.wait_until_running(DEPLOYMENT, None, ailing)
    assert not left
    says(("UNHEALTHY", "UNHEALTHY", "UNHEALTHY", "HEALTHY"))
    with pytest.raises(EngineStartError, match=r"did not start:\nagents: agents is ill$"):
        app.wait_until_running(DEPLOYMENT, None, ailing)


def test_a_start_takes_no_longer_than_it_may(says):
    says(*[CHANGING] * 3)
    with pytest.raises(EngineStartError, match="not ready after 120 s: agents is UPDATING"):
        app.wait_until_running(DEPLOYMENT, None)
