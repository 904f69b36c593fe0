"""Records of the deployments that this user has started on this machine: where each runs, so that other commands find it.

They are kept in a folder that only this user can read, since what they say is believed. A deployment's name is that of one
record at a time.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.errors import ConfigError


@dataclass(frozen=True)
class Record:
    """`address`: of its Ray cluster. `base`: folder of its base. `started`: when its process was started, as psutil reports
    it, seconds since 1970."""

    name: str
    address: str
    base: str
    http_port: int
    grpc_port: int
    pid: int
    started: float

    @classmethod
    def of(cls, deployment: Deployment, address: str) -> Record:
        """Of a deployment that this process runs."""
        router, me = deployment.router, psutil.Process()
        base = deployment.base.model
        return cls(deployment.name, address, base, router.http_port, router.grpc_port, me.pid, me.create_time())

    @property
    def lives(self) -> bool:
        try:
            return psutil.Process(self.pid).create_time() == self.started
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        ports = f"HTTP port {self.http_port}, gRPC port {self.grpc_port}"
        return f"{self.name}: base {Path(self.base).name}, {ports}, Ray at {self.address}, process {self.pid}"


def folder() -> Path:
    """The folder of records. Only this user may write there, because its content is trusted."""
    mine = Path(tempfile.gettempdir()) / f"prefillshare-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.stat().st_uid != os.getuid() or mine.is_symlink():
        raise ConfigError(f"{mine} belongs to somebody else", fix="remove it, or set TMPDIR to a folder of your own")
    return mine


def records() -> list[Record]:
    """Records of the deployments that run, by name."""
    found = []
    for file in sorted(folder().glob("*.json")):
        try:
            record = Record(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):  # gone meanwhile, or of another version
            continue
        if record.lives:
            found.append(record)
        else:
            file.unlink(missing_ok=True)
    return found


def refuse_taken(name: str) -> None:
    """Raises ConfigError if a deployment of this name runs already."""
    for record in records():
        if record.name == name:
            raise ConfigError(
                f"a deployment of this name runs already: {record}",
                field="name",
                fix=f"give this one another name, end process {record.pid}, or change what it runs: prefillshare apply FILE",
            )


@contextmanager
def kept(record: Record) -> Iterator[None]:
    """Within this context, other commands find the deployment. Raises ConfigError if its name is taken."""
    refuse_taken(record.name)
    file = folder() / f"{record.name}.json"
    whole = file.with_suffix(f".{record.pid}")
    whole.write_text(json.dumps(asdict(record)))
    try:
        os.link(whole, file)  # unlike a rename, it replaces nothing
    except FileExistsError:
        refuse_taken(record.name)
        whole.replace(file)  # what is there cannot be read: it is of another version
    finally:
        whole.unlink(missing_ok=True)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
