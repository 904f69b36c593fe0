"""A command speaks to the deployment that it is told, or to the only one; of several it chooses none by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prefillshare import ray_address, records, which
from prefillshare.kvshare.errors import ConfigError
from prefillshare.records import Record


@pytest.fixture
def runs(monkeypatch):
    """runs(*names, clusters=): these deployments, and other Ray clusters, run on this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def make(*names: str, clusters: tuple[str, ...] = ()) -> list[Record]:
        made = [Record(name, f"127.0.0.1:{n}", "/m/base", 8000 + n, 9000 + n, n, 1.0) for n, name in enumerate(names)]
        monkeypatch.setattr(records, "records", lambda: made)
        monkeypatch.setattr(ray_address, "on_this_machine", lambda: list(clusters))
        return made

    return make


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    monkeypatch.setattr(which.sys, "stdin", SimpleNamespace(isatty=lambda: False))


def test_the_only_one_is_found(runs):
    (demo,) = runs("demo", clusters=("10.0.0.1:6379",))
    assert which.found(None, None) == which.Found(demo.address, demo)
    assert which.found(None, "auto").record is demo
    assert which.found("demo", None).record is demo


def test_each_of_several_is_found_by_its_name_or_address(runs):
    made = runs("demo", "coder")
    assert [which.found(one.name, None).record for one in made] == made
    assert [which.found(None, one.address).record for one in made] == made


def test_an_address_that_is_given_goes_before_all_else(runs, monkeypatch):
    demo, _ = runs("demo", "coder")
    assert which.found(None, "10.0.0.9:6379") == which.Found("10.0.0.9:6379", None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.8:6379")
    assert which.found(None, None).address == "10.0.0.8:6379"
    assert which.found("elsewhere", None).address == "10.0.0.8:6379"
    assert which.found("demo", None).record is demo
    assert which.found(None, "10.0.0.9:6379").address == "10.0.0.9:6379"


def test_of_several_none_is_chosen_and_all_are_listed(runs):
    runs("demo", "coder")
    with pytest.raises(ConfigError) as refused:
        which.found(None, None)
    assert str(refused.value) == (
        "2 deployments run on this machine:\n"
        "  demo: base base, HTTP port 8000, gRPC port 9000, Ray at 127.0.0.1:0, process 0\n"
        "  coder: base base, HTTP port 8001, gRPC port 9001, Ray at 127.0.0.1:1, process 1"
        " (fix: say which one, like --name demo)"
    )


def test_a_name_that_no_deployment_has_is_told_with_those_there_are(runs):
    runs("demo")
    with pytest.raises(ConfigError, match=r"name: no deployment 'coder' runs on this machine; these do:\n  demo: base"):
        which.found("coder", None)


def test_without_any_there_may_be_a_cluster_of_somebody_elses(runs):
    runs(clusters=("10.0.0.1:6379",))
    assert which.found("demo", None) == which.Found("10.0.0.1:6379", None)
    runs(clusters=("10.0.0.1:6379", "10.0.0.1:6380"))
    with pytest.raises(ConfigError, match=r"2 Ray clusters run on this machine:[^(]*\(fix: say which one, like --address 10"):
        which.found(None, None)
    runs()
    with pytest.raises(ConfigError, match=r"no deployment runs on this machine \(fix: start it: prefillshare serve FILE;"):
        which.found(None, None)


def test_at_a_terminal_the_user_is_asked(runs, monkeypatch, capsys):
    _, coder = runs("demo", "coder")
    answers = iter(["7", "2"])
    monkeypatch.setattr("typer.prompt", lambda *_, **kw: kw["type"](next(answers)))
    monkeypatch.setattr(which.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(ConfigError, match="say which one"):  # what it says may go to a file
        which.found(None, None)
    monkeypatch.setattr(which.sys.stderr, "isatty", lambda: True, raising=False)
    assert which.found(None, None).record is coder
    shown = capsys.readouterr()
    assert shown.out == ""  # which may be piped to a program
    assert shown.err.splitlines()[1].startswith("  2  coder: base base")
    assert "A number from 1 to 2." in shown.err
