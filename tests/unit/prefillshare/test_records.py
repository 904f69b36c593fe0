"""Deployments that run on this machine are found by name; each name is one deployment's."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from prefillshare import records
from prefillshare.kvshare.errors import ConfigError
from prefillshare.records import Record


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records.tempfile, "gettempdir", lambda: str(tmp_path))


def record(name: str = "demo", *, lives: bool = True) -> Record:
    me = psutil.Process()
    return Record(name, "10.0.0.1:6379", "/models/smollm2", 8000, 9000, me.pid, me.create_time() if lives else 1.0)


def write(one: Record) -> Path:
    file = records.folder() / f"{one.name}.json"
    file.write_text(json.dumps(asdict(one)))
    return file


def test_what_is_kept_is_found_until_it_ends():
    with records.kept(record("b")), records.kept(record("a")):
        assert [one.name for one in records.records()] == ["a", "b"]
    assert records.records() == []
    assert list(records.folder().iterdir()) == []


def test_a_name_is_one_deployments():
    with records.kept(record()):
        with pytest.raises(ConfigError, match="name: a deployment of this name runs already: demo: base smollm2, HTTP"):
            records.refuse_taken("demo")
        refused = pytest.raises(ConfigError, match="give this one another name, end process")
        with refused, records.kept(replace(record(), http_port=8010)):
            pass
        assert [one.http_port for one in records.records()] == [8000]
    records.refuse_taken("demo")


def test_of_two_that_start_at_once_one_gets_the_name(monkeypatch):
    """The second has seen no record of the first."""
    write(record())
    refuse, seen = records.refuse_taken, []
    monkeypatch.setattr(records, "refuse_taken", lambda name: refuse(name) if seen else seen.append(name))
    with pytest.raises(ConfigError, match="runs already"), records.kept(record()):
        pass
    assert len(list(records.folder().iterdir())) == 1


def test_one_whose_process_has_died_is_forgotten_and_its_name_is_free():
    file = write(record(lives=False))
    assert records.records() == []
    assert not file.exists()
    write(record(lives=False))
    with records.kept(record()):
        assert len(records.records()) == 1


@pytest.mark.parametrize("text", ['{"address"', "{}", '{"address": "x", "http_port": 1, "grpc_port": 2, "pid": 3}'])
def test_a_damaged_record_or_one_of_another_version_is_passed_over(text):
    (records.folder() / "demo.json").write_text(text)
    assert records.records() == []
    with records.kept(record()):
        assert [one.name for one in records.records()] == ["demo"]


def test_only_this_user_reads_the_folder_and_that_of_somebody_else_is_not_believed(tmp_path, monkeypatch):
    assert records.folder().stat().st_mode & 0o777 == 0o700
    uid = records.os.geteuid() + 1
    monkeypatch.setattr(records.os, "getuid", lambda: uid)
    (tmp_path / f"prefillshare-{uid}").mkdir()
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        records.records()
