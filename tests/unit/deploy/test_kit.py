"""The kit for a GPU machine without a network: what is gathered, what is left out, and what the machine is told."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

KIT = Path(__file__).parents[3] / "deploy" / "kit"
PTX, MACHINE_CODE = 1, 2
GPU = ["2.11.0+cu130", "13.0", [9, 0]]


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, KIT / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, loaded)  # a dataclass looks its own module up
    spec.loader.exec_module(loaded)
    return loaded


device_code, gather, prove = map(module, ("device_code", "gather", "prove"))


def fat_binary(*codes: tuple[int, int, bytes]) -> bytes:
    """Of (kind, architecture, code)."""
    entries = b"".join(
        struct.pack("<HHIQ12xI32x", kind, 1, 64, len(code), architecture) + code for kind, architecture, code in codes
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


@pytest.mark.parametrize(
    ("codes", "kept"),
    [
        ([(MACHINE_CODE, 80), (MACHINE_CODE, 90), (MACHINE_CODE, 100), (PTX, 80)], [(MACHINE_CODE, 90)]),
        ([(MACHINE_CODE, 80), (PTX, 80), (PTX, 100)], [(PTX, 80)]),
        ([(MACHINE_CODE, 100), (MACHINE_CODE, 120)], []),
        ([(MACHINE_CODE, 90), (MACHINE_CODE, 90)], [(MACHINE_CODE, 90), (MACHINE_CODE, 90)]),
    ],
)
def test_only_the_code_that_a_gpu_takes_is_kept(codes, kept):
    all_code = [(*code, bytes([65 + number]) * 24) for number, code in enumerate(codes)]
    before = b"\x7fELF, host code" + fat_binary(*all_code) + b"more host code"
    after = device_code.only_for(90, before)
    assert len(after) == len(before)
    assert after.startswith(b"\x7fELF, host code")
    assert after.endswith(b"more host code")
    there = [(one.kind, one.architecture) for (codes,) in [device_code.containers(after)] for one in codes]
    assert there == codes, "headers stay"
    left = [(kind, architecture) for kind, architecture, code in all_code if code in after]
    assert left == kept


def test_machine_code_runs_on_later_minor_versions_of_its_capability():
    both = fat_binary((MACHINE_CODE, 80, b"A" * 24), (MACHINE_CODE, 90, b"B" * 24))
    assert b"A" * 24 in device_code.only_for(89, both)
    assert b"B" * 24 not in device_code.only_for(89, both)


def test_what_only_looks_like_device_code_is_left_alone():
    data = b"host" + struct.pack("<IHHQ", 0xBA55ED50, 7, 16, 8) + b"12345678" + struct.pack("<I", 0xBA55ED50)
    assert device_code.only_for(90, data) == data


def test_every_package_is_locked():
    lock = (KIT.parents[1] / "requirements/gpu.lock").read_text()
    wanted = gather.pinned((KIT / "packages.txt").read_text(), lock)
    assert wanted["vllm"].startswith("0.32")
    assert not {"torch", "triton", "numpy", "ray"} & wanted.keys()
    with pytest.raises(gather.GatherError, match=r"no other.*make lock"):
        gather.pinned("# note\n\nvllm\nother\n", "vllm==0.32.0\n")


@pytest.mark.parametrize("text", ["9", "sm_90", "9.x", ""])
def test_a_compute_capability_has_two_numbers(text):
    assert gather.capability("12.0") == (12, 0)
    with pytest.raises(gather.GatherError, match=r"--compute-capability.*nvidia-smi"):
        gather.capability(text)


@pytest.fixture
def wheels(monkeypatch):
    """In place of the packages: a few files of them."""

    def install(site: Path, what, glibc=()):
        for name in (
            "vllm/_C_stable_libtorch.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so", "vllm/envs.py",
            "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
            "nixl_ep_cu13/kernels.so", "nixl_cu13.libs/libaws-core.so", "nixl_cu13.libs/libucp.so",
        ):  # fmt: skip
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_bytes(fat_binary((MACHINE_CODE, 80, b"A" * 24), (MACHINE_CODE, 90, b"B" * 24)))

    monkeypatch.setattr(gather, "install", install)
    monkeypatch.setattr(gather, "own_wheel", lambda folder: folder)
    monkeypatch.setattr(gather, "COMPRESSION", [{"id": gather.lzma.FILTER_LZMA2, "preset": 0}])
    return Console(file=io.StringIO())


@pytest.mark.parametrize(("capability", "flash"), [((9, 0), "_vllm_fa3_C"), ((8, 0), "_vllm_fa2_C")])
def test_a_kit_has_what_its_gpus_use(wheels, tmp_path, capability, flash):
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "of an earlier one").touch()
    (tmp_path / "kit" / "manifest.json").touch()
    gather.gather(tmp_path / "kit", capability, 60, wheels)
    assert {path.name for path in (tmp_path / "kit").iterdir()} == {"site.tar.xz", "manifest.json", "prove.py"}
    with tarfile.open(tmp_path / "kit" / "site.tar.xz") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    assert files.keys() == {
        "vllm/_C_stable_libtorch.abi3.so", f"vllm/vllm_flash_attn/{flash}.abi3.so", "vllm/envs.py", "nixl_cu13.libs/libucp.so"
    }  # fmt: skip
    code = files["vllm/_C_stable_libtorch.abi3.so"]
    assert (b"A" * 24 in code, b"B" * 24 in code) == (capability == (8, 0), capability == (9, 0))


def test_a_kit_that_is_too_large_replaces_nothing(wheels, tmp_path):
    (tmp_path / "kit").mkdir()
    with pytest.raises(gather.GatherError, match=r"more than --limit-mib 1e-06"):
        gather.gather(tmp_path / "kit", (9, 0), 1e-6, wheels)
    assert not list((tmp_path / "kit").iterdir())


def test_a_folder_that_is_no_kit_is_not_replaced(wheels, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(gather.GatherError, match=r"--output.*no kit.*fix"):
        gather.gather(tmp_path, (9, 0), 60, wheels)
    assert (tmp_path / "thesis.txt").is_file()


def test_gpus_for_which_there_is_no_code_are_refused(wheels, tmp_path):
    with pytest.raises(gather.GatherError, match=r"no code for compute capability 7.*--compute-capability"):
        gather.gather(tmp_path / "kit", (7, 0), 60, wheels)
    assert not device_code.has_code_for(90, fat_binary((MACHINE_CODE, 90, bytes(24))))


def test_what_pip_says_is_told(monkeypatch, tmp_path):
    done = SimpleNamespace(returncode=1, stderr="ERROR: no matching distribution")
    monkeypatch.setattr(gather.subprocess, "run", lambda *args, **kw: done)
    with pytest.raises(SystemExit) as ended:
        gather.main(["--output", str(tmp_path / "kit")])
    assert ended.value.code == 1


@pytest.fixture
def kit(monkeypatch, tmp_path):
    """A machine with everything, and a kit of one small package."""
    site = tmp_path / "made"
    (site / "prefillshare").mkdir(parents=True)
    (site / "prefillshare" / "__main__.py").write_text("import sys\nprint(sys.argv[1:])\n")
    quiet = Console(file=io.StringIO())
    gather.Site(site, 90, quiet).pack(tmp_path / "site.tar.xz", gather.QUICK_COMPRESSION)
    monkeypatch.setattr(prove, "KIT", tmp_path)
    monkeypatch.setattr(prove.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(prove.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(prove.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in prove.CACHES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "Python.h").touch()
    has(monkeypatch, GPU)
    here = ".".join(map(str, sys.version_info[:2]))
    about = {"python": here, "compute_capability": [9, 0], "sha256": {"site.tar.xz": gather.sha256(tmp_path / "site.tar.xz")}}
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    return about


def sites() -> list[Path]:
    """Where the kit's packages have been unpacked."""
    return list(prove.KIT.glob("site-*"))


def has(monkeypatch, torch: list) -> None:
    done = subprocess.CompletedProcess([], 0, json.dumps(torch) + "\n", "")
    monkeypatch.setattr(prove.subprocess, "run", lambda *args, **kw: done)


def test_a_machine_with_everything_runs_the_proof(kit, monkeypatch):
    ran = []
    monkeypatch.setattr(prove.os, "execve", lambda program, command, environment: ran.append((command, environment)))
    for _ in range(2):  # unpacked once
        prove.main(["--stage", "exact"])
    command, environment = ran[-1]
    assert command[-3:] == ["prove", "--stage", "exact"]
    (site,) = sites()
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(site)
    assert environment["TRITON_CACHE_DIR"].startswith(str(prove.KIT))
    without_others = [command[0], "-S", *command[1:]]
    said = subprocess.Popen(without_others, cwd=KIT.parents[1], env=environment, stdout=subprocess.PIPE, text=True)
    assert said.communicate()[0] == "['prove', '--stage', 'exact']\n"
    assert [path.name for path in site.iterdir()] == ["prefillshare"]
    assert not list(prove.KIT.glob("tmp*"))


def test_a_damaged_archive_is_not_unpacked(kit, capsys):
    archive = prove.KIT / "site.tar.xz"
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(SystemExit):
        prove.main([])
    assert "site.tar.xz is damaged" in capsys.readouterr().err
    assert not sites()


def with_torch(kit) -> list[Path]:
    """Add a torch in parts to the kit."""
    (prove.KIT / "made_torch" / "torch").mkdir(parents=True)
    (prove.KIT / "made_torch" / "torch" / "__init__.py").write_bytes(os.urandom(2000))
    archive = prove.KIT / "torch.tar.xz"
    gather.Site(prove.KIT / "made_torch", 90, Console(file=io.StringIO())).pack(archive, gather.QUICK_COMPRESSION)
    parts = gather.split(archive, prove.KIT, 1000)
    kit["torch"] = {part.name: gather.sha256(part) for part in parts}
    (prove.KIT / "manifest.json").write_text(json.dumps(kit))
    return parts


def test_a_torch_of_its_own_takes_precedence(kit, monkeypatch):
    parts = with_torch(kit)
    assert [part.name for part in parts] == [f"torch.tar.xz.{n:02}" for n in range(len(parts))]
    assert len(parts) > 2
    ran = []
    monkeypatch.setattr(prove.os, "execve", lambda program, command, environment: ran.append(environment))
    prove.main([])
    (site,), (torch,) = sites(), prove.KIT.glob("torch-*")
    assert ran[0]["PYTHONPATH"].split(os.pathsep)[:2] == [str(site), str(torch)]
    assert (torch / "torch" / "__init__.py").stat().st_size == 2000


def test_a_torch_that_is_not_all_there_is_told_and_none_is_the_machines(kit, monkeypatch, capsys):
    parts = with_torch(kit)
    parts[1].unlink()
    with pytest.raises(SystemExit):
        prove.main([])
    assert "torch.tar.xz.01 is missing" in capsys.readouterr().err
    for part in parts:
        part.unlink(missing_ok=True)
    ran = []
    monkeypatch.setattr(prove.os, "execve", lambda program, command, environment: ran.append(environment))
    prove.main([])
    assert not list(prove.KIT.glob("torch-*"))
    assert len(ran) == 1


def test_another_kit_in_the_same_folder_is_unpacked_anew(kit, monkeypatch):
    ran = []
    monkeypatch.setattr(prove.os, "execve", lambda program, command, environment: ran.append(environment))
    prove.main([])
    (prove.KIT / "made" / "prefillshare" / "new.py").touch()
    gather.Site(prove.KIT / "made", 90, Console(file=io.StringIO())).pack(
        prove.KIT / "site.tar.xz", gather.QUICK_COMPRESSION
    )
    kit["sha256"] = {"site.tar.xz": gather.sha256(prove.KIT / "site.tar.xz")}
    (prove.KIT / "manifest.json").write_text(json.dumps(kit))
    prove.main([])
    new = Path(ran[1]["PYTHONPATH"].split(os.pathsep)[0])
    assert (new / "prefillshare" / "new.py").is_file()
    assert len(sites()) == 2


def test_what_is_no_kit_says_how_to_make_one(kit):
    (prove.KIT / "manifest.json").unlink()
    with pytest.raises(SystemExit, match=r"is no kit .*gather\.py"):
        prove.main([])


@pytest.mark.parametrize(
    ("torch", "problem"),
    [
        (["2.10.0", "13.0", [9, 0]], "torch is 2.10.0"),
        (["2.11.0", "12.8", [9, 0]], "built for CUDA 12.8"),
        (["2.11.0", None, False], "finds no GPU"),
        (["2.11.0", "13.0", [8, 0]], "--compute-capability 8.0"),
    ],
)
def test_a_torch_that_does_not_fit_is_told_with_the_fix(kit, monkeypatch, torch, problem, capsys):
    has(monkeypatch, torch)
    with pytest.raises(SystemExit) as ended:
        prove.main([])
    assert ended.value.code == 1
    assert problem in capsys.readouterr().err
    assert not sites()


def test_all_problems_are_told_at_once(kit, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(prove.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").unlink()
    monkeypatch.setattr(prove.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    monkeypatch.setattr(prove.os, "access", lambda path, how: False)
    monkeypatch.setattr(prove.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(prove.platform, "libc_ver", lambda: ("glibc", "2.28"))
    found = "\n".join(prove.machine_problems({**kit, "python": "3.8"}, {"site": kit["sha256"]}))
    for problem in ("python3.8", "C compiler", "Python.h", "MiB left", "cannot be written", "aarch64", "glibc is 2.28"):
        assert problem in found
    with pytest.raises(SystemExit):
        prove.main(["--look"])
    assert "not ready" in capsys.readouterr().err


def test_looking_changes_nothing(kit, capsys):
    with pytest.raises(SystemExit) as ended:
        prove.main(["--look"])
    assert ended.value.code == 0
    assert "ready" in capsys.readouterr().err
    assert not sites()
