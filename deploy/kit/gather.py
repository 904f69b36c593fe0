"""Gathers what a GPU machine without a network needs to run `prefillshare prove`: python deploy/kit/gather.py

The machine has Linux on x86-64 (glibc 2.31 or newer), Python 3.12, an NVIDIA driver, and torch 2.11 or newer for CUDA 13.
Everything else goes into one folder of at most 60 MiB: packages.txt at the versions of requirements/gpu.lock, and this project.
vLLM's wheel alone is 319 MiB, so its kernels for models of other kinds stay away, and so does the device code of other GPUs
(device_code.py).

    python deploy/kit/gather.py [--output kit] [--compute-capability 9.0]
    python kit/prove.py [arguments of prefillshare prove]       (there)

If the machine's torch turns out not to do, --torch adds the locked one (with triton and NCCL) in parts; none
is larger than the kit itself may be. prove.py uses it once all parts are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from device_code import has_code_for, only_for

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
PYTHON = "3.12"
#: Wheels for these versions of glibc are taken; each system runs those of earlier ones.
GLIBC = range(31, 4, -1)
ARCHIVE, TORCH_ARCHIVE, MANIFEST, COMMAND = "site.tar.xz", "torch.tar.xz", "manifest.json", "prove.py"
TORCH = ("torch", "triton", "nvidia-nccl-cu13")
#: Of the project's folders, those from which no wheel contains anything.
NO_SOURCE = (".*", "adapters", "benchmarks", "build", "data", "logs", "models", "runs", "tests", "*.egg-info")
#: Globs of what is left out: kernels for other models, vLLM's server in Rust, NIXL's ways to storage and clouds,
#: formats of images, faster versions of what a proof hardly uses, what is no code.
LEFT_OUT = (
    "bin",
    "include",
    "*.dist-info/RECORD",
    "*.dist-info/licenses",
    "nixl_cu13.scripts",
    "nixl_ep*",
    "nixl_cu13.libs/libaws*",
    "nixl_cu13.libs/libazure*",
    "nixl_cu13.libs/libgusli*",
    "nixl_cu13.libs/libs2n*",
    "nixl_cu13.libs/libxml2*",
    "nixl_cu13.libs/nixl/libplugin_[!U]*",
    ".nixl_cu13.mesonpy.libs/plugins/libplugin_[!U]*",
    "**/*.a",
    "**/*.la",
    "**/tests",
    "vllm/_*.so",
    "vllm/third_party/deep_gemm",
    "vllm/third_party/fmha_sm100",
    "vllm/vllm-rs",
    "vllm/vllm_flash_attn/*.so",
    "vllm/benchmarks",
    "vllm/entrypoints/serve/instrumentator/static",
    "nixl_cu13.libs/ucx/libucx_perftest*",
    "aiohttp/**/*.so",
    "yaml/*.so",
    "vllm/model_executor/layers/fused_moe/configs",
    "PIL/_avif*",
    "PIL/_imagingft*",
    "PIL/_webp*",
    "pillow.libs/libavif*",
    "pillow.libs/libfreetype*",
    "pillow.libs/libharfbuzz*",
    "pillow.libs/libwebp*",
)
TORCH_LEFT_OUT = (
    "bin",
    "*.dist-info/RECORD",
    "*.dist-info/licenses",
    "**/*.a",
    "torch/bin/protoc*",
    "torch/include",
    "torch/share",
    "torch/test",
    "triton/_C/libproton.so",
    "triton/backends/amd/lib",
    "triton/backends/nvidia/bin/ptxas-blackwell",
    "triton/backends/nvidia/lib/cupti",
    "triton/instrumentation",
)
#: Globs of what is kept of them all the same.
KEPT = ("vllm/_C_stable_libtorch.abi3.so",)
#: Major compute capability -> FlashAttention's extension module; others take `_vllm_fa2_C`.
FLASH_ATTENTION = {9: "_vllm_fa3_C"}


#: The dictionary spans the largest extension module, whose kernels are much alike.
COMPRESSION = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 192 << 20},
]
QUICK_COMPRESSION = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]


class GatherError(Exception):
    """What was asked for cannot be gathered; says why, and what to do."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python deploy/kit/gather.py",
        description=__doc__.split("\n\n", 1)[0],
        epilog="Takes about five minutes, most of them for compressing. Needs a network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("kit"), help="folder that is made, or made anew")
    parser.add_argument("--compute-capability", default="9.0", help="of its GPUs (nvidia-smi --query-gpu=compute_cap)")
    parser.add_argument("--limit-mib", type=float, default=60, help="most that the folder, or a part of torch, may take")
    parser.add_argument("--torch", action="store_true", help="add torch and triton, in parts (ten minutes more)")
    args = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        gather(args.output, capability(args.compute_capability), args.limit_mib, console, with_torch=args.torch)
    except GatherError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True)
        raise SystemExit(1) from None


def capability(text: str) -> tuple[int, int]:
    """Raises GatherError unless it is like 9.0."""
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise GatherError(f"--compute-capability: {text!r} is not like 9.0 (fix: nvidia-smi --query-gpu=compute_cap tells it)")
    return int(major), int(minor)


def gather(
    output: Path, compute_capability: tuple[int, int], limit_mib: float, console: Console, *, with_torch: bool = False
) -> None:
    """Make the kit in `output`. Raises GatherError if a package cannot be had or the kit is larger than `limit_mib`."""
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise GatherError(f"--output: {output} holds something that is no kit (fix: name a folder that is empty or not there)")
    major, minor = compute_capability
    lock = (PROJECT / "requirements" / "gpu.lock").read_text()
    wanted = pinned((HERE / "packages.txt").read_text(), lock)
    with tempfile.TemporaryDirectory(prefix="prefillshare-kit-") as work:
        made = Path(work) / "kit"
        made.mkdir()
        with console.status("building prefillshare"):
            own = own_wheel(Path(work))
        flash_attention = f"vllm/vllm_flash_attn/{FLASH_ATTENTION.get(major, '_vllm_fa2_C')}*.so"
        site = Site(Path(work) / "site", 10 * major + minor, console)
        site.fetch(wanted, [own])
        site.prune(LEFT_OUT, (*KEPT, flash_attention))
        for glob in (*KEPT, flash_attention):
            site.check(glob)
        site.pack(made / ARCHIVE, COMPRESSION)
        shutil.copy2(HERE / COMMAND, made / COMMAND)
        about = {"python": PYTHON, "compute_capability": compute_capability, "packages": wanted}
        about["sha256"] = {ARCHIVE: sha256(made / ARCHIVE)}
        if (size := mib(made)) > limit_mib:
            raise GatherError(f"the kit takes {size:.1f} MiB, more than --limit-mib {limit_mib:g}")
        console.print(f"{size:8.1f} MiB  the kit")
        if with_torch:
            torch = Site(Path(work) / "torch", site.architecture, console)
            torch.fetch(pinned("\n".join(TORCH), lock))
            torch.prune(TORCH_LEFT_OUT)
            torch.check("torch/lib/libtorch_cuda.so")
            torch.pack(Path(work) / TORCH_ARCHIVE, QUICK_COMPRESSION)
            parts = split(Path(work) / TORCH_ARCHIVE, made, int(limit_mib * 2**20))
            about["torch"] = {part.name: sha256(part) for part in parts}
            console.print(f"{sum(part.stat().st_size for part in parts) / 2**20:8.1f} MiB  torch, in {len(parts)} parts")
        (made / MANIFEST).write_text(json.dumps(about, indent=1) + "\n")
        shutil.rmtree(output, ignore_errors=True)  # refused before if it is no kit
        shutil.copytree(made, output)
    console.print(f"made: {output}; on the GPU machine: python {output.name}/{COMMAND}")


@dataclass(frozen=True)
class Site:
    """Packages as they are installed, for GPUs of one architecture."""

    folder: Path
    architecture: int
    console: Console

    def fetch(self, packages: Mapping[str, str], wheels: Sequence[Path] = ()) -> None:
        """`packages`: name -> version."""
        with self.console.status(f"fetching {len(packages)} packages"):
            install(self.folder, [f"{name}=={version}" for name, version in packages.items()], GLIBC)
            if wheels:
                install(self.folder, wheels)
        self._tell("as fetched")

    def prune(self, left_out: Sequence[str], kept: Sequence[str] = ()) -> None:
        """Remove what matches the globs in `left_out`, save files that match those in `kept`, and others' device code."""
        keep = {path for glob in kept for path in self.folder.glob(glob)}
        for path in [path for glob in left_out for path in self.folder.glob(glob)]:
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in keep:
                path.unlink(missing_ok=True)
        for module in sorted(self.folder.glob("*/**/*.so*")):
            module.write_bytes(only_for(self.architecture, module.read_bytes()))
        self._tell("without what a proof does not use")

    def check(self, glob: str) -> None:
        """Raises GatherError unless the extension module still has code for these GPUs."""
        modules = list(self.folder.glob(glob))
        if not modules or not all(has_code_for(self.architecture, module.read_bytes()) for module in modules):
            raise GatherError(
                f"{glob} has no code for compute capability {self.architecture / 10:g} (fix: --compute-capability of a GPU that"
                " vLLM supports; or its fat binaries have a new format, see device_code.py)"
            )

    def pack(self, archive: Path, compression: list[dict]) -> None:
        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid = member.gid = member.mtime = 0
            member.uname = member.gname = ""
            return member

        with (
            self.console.status("compressing, which takes minutes"),
            lzma.open(archive, "wb", filters=compression) as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            for path in sorted(self.folder.iterdir()):
                tar.add(path, path.name, filter=plain)

    def _tell(self, what: str) -> None:
        self.console.print(f"{mib(self.folder):8.1f} MiB  {what}")


def split(archive: Path, folder: Path, most_bytes: int) -> list[Path]:
    """The archive's bytes in numbered files of at most so many bytes each."""
    parts = []
    with archive.open("rb") as file:
        while piece := file.read(most_bytes):
            parts.append(folder / f"{archive.name}.{len(parts):02}")
            parts[-1].write_bytes(piece)
    return parts


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def pinned(packages: str, lock: str) -> dict[str, str]:
    """Name -> version of each package. Raises GatherError for one that the lock file does not have."""
    versions = dict(line.split("==") for line in lock.split() if "==" in line)
    names = [line for line in packages.splitlines() if line and not line.startswith("#")]
    if missing := [name for name in names if name not in versions]:
        raise GatherError(f"requirements/gpu.lock has no {', '.join(missing)} (fix: make lock, or correct packages.txt)")
    return {name: versions[name] for name in names}


def install(site: Path, what: Sequence[str | Path], glibc: Sequence[int] = ()) -> None:
    """Unpack wheels into a folder as pip does. Raises GatherError with pip's last words."""
    platforms = [word for minor in glibc for word in ("--platform", f"manylinux_2_{minor}_x86_64")]
    other = [*platforms, "--platform", "manylinux2014_x86_64", "--python-version", PYTHON, "--only-binary", ":all:"]
    pip("install", "--target", site, "--no-deps", "--no-compile", *(other if glibc else []), *what)


def own_wheel(folder: Path) -> Path:
    """Built from a copy: in the checkout, setuptools would leave a folder behind and take files from it the next time."""
    source = shutil.copytree(PROJECT, folder / "source", ignore=shutil.ignore_patterns(*NO_SOURCE))
    pip("wheel", "--no-deps", "--wheel-dir", folder, source)
    return next(folder.glob("prefillshare-*.whl"))


def pip(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise GatherError(f"pip {arguments[0]}: {done.stderr.strip()[-2000:]}")


def mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 2**20


if __name__ == "__main__":
    main()
