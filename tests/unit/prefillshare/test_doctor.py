"""`prefillshare doctor` finds what is wrong with a machine, names it, and says what to do."""

from __future__ import annotations

import os
import socket
import subprocess
from collections import namedtuple

import pytest
from ports import free_port
from typer.testing import CliRunner

from prefillshare import cli, doctor, nixl_loopback
from prefillshare.doctor import GIB, Finding, Level

pytestmark = pytest.mark.slow

Usage = namedtuple("Usage", "total used free")


def test_what_is_installed_is_compared_with_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["old>=2", "gone", "fine<9", "extra; extra == 'x'"])
    there = {"old": "1.5", "fine": "8.1"}

    def version(name):
        if name in there:
            return there[name]
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.platform, "vllm_build", lambda: "")
    found = {finding.found: finding for finding in doctor.versions()}
    assert set(found) == {"old is 1.5", "gone is not installed", "is not installed"}
    assert found["old is 1.5"].fix == "pip install 'old>=2'"
    assert {finding.level for finding in found.values()} == {Level.WRONG}


def test_this_machine_has_what_the_project_asks_for():
    assert [finding.level for finding in doctor.versions()] == [Level.OK, Level.OK]


@pytest.mark.parametrize(("free_gib", "level"), [(64 / 1024, Level.WARNING), (2, Level.OK)])
def test_a_containers_shared_memory_is_too_small(monkeypatch, tmp_path, free_gib, level):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(0, 0, free_gib * GIB))
    (finding,) = doctor.shared_memory(str(tmp_path))
    assert finding.level == level
    assert ("--shm-size" in finding.fix) == (level == Level.WARNING)


def test_without_shared_memory_nothing_works(tmp_path):
    (finding,) = doctor.shared_memory(str(tmp_path / "none"))
    assert finding.level == Level.WRONG


def test_a_port_that_is_taken_is_named_with_who_has_it():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, free = taken.getsockname()[1], free_port()
        found = list(doctor.ports({port: "router.grpc_port", free: "router.http_port"}))
    assert [finding.level for finding in found] == [Level.WARNING, Level.OK]
    assert f"{port} is taken by process {os.getpid()}" in found[0].found
    assert "router.grpc_port" in found[0].fix
    assert found[1].found == f"{free} free"


def test_a_read_by_nixl_is_really_made():
    (finding,) = doctor.nixl()
    assert finding.level == Level.OK
    assert "GB/s" in finding.found
    assert "UCX" in finding.found


def test_a_transport_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "BACKEND", "NO_SUCH_BACKEND")
    (finding,) = doctor.nixl()
    assert finding.level == Level.WRONG
    assert "NO_SUCH_BACKEND" in finding.found
    assert "UCX_TLS" in finding.fix


def test_a_transport_that_hangs_is_ended(monkeypatch):
    def hangs(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(doctor.subprocess, "run", hangs)
    (finding,) = doctor.nixl()
    assert "it did not end within 60 s" in finding.found


def test_the_loopback_notices_a_wrong_read(monkeypatch):
    monkeypatch.setattr(nixl_loopback.np, "array_equal", lambda a, b: False)
    with pytest.raises(RuntimeError, match="not what was there"):
        nixl_loopback.read("UCX")


def test_a_cpu_without_preloads_is_slow(monkeypatch):
    monkeypatch.setattr(doctor.platform, "on_cpu", lambda: True)
    monkeypatch.setattr(doctor.platform, "engine_environment", dict)
    found = {finding.found: finding.level for finding in doctor.accelerators()}
    assert found["no tcmalloc: engines run at half their speed"] == Level.WARNING


def test_the_command_says_all_and_ends_with_what_is_wrong(monkeypatch, tmp_path):
    fine, wrong = Finding("a", Level.OK, "well"), Finding("b", Level.WRONG, "broken [1]", "mend it")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([fine]),))
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([fine, wrong]),))
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == 1
    assert "ok  a: well" in done.output
    assert "wrong  b: broken [1]" in done.output
    assert "fix: mend it" in done.output


def test_a_deployment_that_cannot_run_here_is_told_of_too(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "CHECKS", ())
    (tmp_path / "d.yaml").write_text("base: {model: nowhere}\ndecode: []\n")
    done = CliRunner().invoke(cli.app, ["doctor", str(tmp_path / "d.yaml")])
    assert done.exit_code == 1
    assert "wrong  deployment: " in done.output

