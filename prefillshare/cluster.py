"""The Ray cluster of a deployment: started for it on this machine or joined, and found again by `apply` and `status`.

A deployment that starts its own cluster leaves a record of it, under its HTTP port, in a folder that only this user can read.
These records tell several deployments on one machine apart; Ray itself would take its latest cluster.

Seam: ray/_private/worker.py (`ray.init`), ray/_private/node.py (`Node`),
ray/_private/authentication/authentication_token_setup.py
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from prefillshare import forkserver, ray_messages
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.errors import ConfigError
from prefillshare.kvshare.loopback import ADDRESS, is_loopback
from prefillshare.local_ray import loopback_kept

# Ray starts its processes by fork. gRPC would start threads in the fork, which end it if they run before it becomes Ray's
# program. gRPC reads this variable when it is first used.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_log = logging.getLogger(__name__)
#: Ray's namespace, and the Serve application's name.
APP = "prefillshare"
ROUTER = "router"
#: Seconds that whatever listens at a cluster's address may take to accept a connection.
CONNECT_S = 5.0
#: For when something listens at the address and Ray's client cannot connect: Ray does not say which of the two causes it is.
_REFUSED_FIX = (
    "give the cluster's token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token), and the address of a Ray head"
    " of this version"
)


@dataclass(frozen=True)
class Record:
    """A deployment that runs in its own local cluster. `started`: when its process was started, as psutil reports it."""

    address: str
    http_port: int
    grpc_port: int
    pid: int
    started: float

    @property
    def lives(self) -> bool:
        try:
            return psutil.Process(self.pid).create_time() == self.started
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"HTTP port {self.http_port}, gRPC port {self.grpc_port}, process {self.pid}: --address {self.address}"


def folder() -> Path:
    """The folder of records. Only this user may write there, because its content is trusted."""
    mine = Path(tempfile.gettempdir()) / f"prefillshare-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.stat().st_uid != os.getuid() or mine.is_symlink():
        raise ConfigError(f"{mine} belongs to somebody else", fix="remove it, or set TMPDIR to a folder of your own")
    return mine


def records() -> list[Record]:
    """Records of the deployments that this user runs on this machine in their own clusters."""
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


@contextmanager
def started(deployment: Deployment) -> Iterator[None]:
    """A local Ray cluster that listens where the router does and requires a token. Raises ConfigError if it does not start."""
    import ray
    from ray._private.authentication.authentication_token_setup import AUTH_MODE_ENV_VAR, _enable_token_auth

    if (mode := os.environ.get(AUTH_MODE_ENV_VAR, "token")).lower() != "token":
        raise ConfigError(
            f"{AUTH_MODE_ENV_VAR} is {mode!r}: anybody who reaches Ray's ports could run programs as this user",
            fix=f"unset {AUTH_MODE_ENV_VAR}, or set it to token",
        )
    _enable_token_auth()  # Ray would do it with a warning that says how to opt out
    options = {"num_cpus": deployment.cluster.num_cpus, "include_dashboard": False}
    if is_loopback(deployment.router.host):
        options["_node_ip_address"] = ADDRESS
    with forkserver.started(folder()) as labels:
        with loopback_kept(deployment.router.host):
            _start(labels=labels, **options)
        try:
            _close_token_file()
            file = _record(deployment)
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
        finally:
            ray.shutdown()


def _record(deployment: Deployment) -> Path:
    """Write down where the deployment runs; returns the file."""
    import ray

    router, me = deployment.router, psutil.Process()
    record = Record(
        ray.get_runtime_context().gcs_address, router.http_port, router.grpc_port, me.pid, me.create_time()
    )
    file = folder() / f"{router.http_port}.json"
    whole = file.with_suffix(f".{me.pid}")
    whole.write_text(json.dumps(asdict(record)))
    return whole.replace(file)


@contextmanager
def joined(address: str, field: str | None = None) -> Iterator[None]:
    """Join a running Ray cluster. Raises ConfigError, which names `field`, if it cannot be joined."""
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    where = _named(address)
    if where is not None and not _answers(*where):
        raise ConfigError(
            f"nothing answers at {where[0]}:{where[1]}", field=field, fix="give the address of a running Ray cluster"
        )
    # Ray does this itself only for clusters that it finds by itself.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    with loopback_kept(where[0] if where else None):
        _init(address, f"cannot join the Ray cluster at {address}", _REFUSED_FIX, field)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def connected(address: str, http_port: int | None = None) -> Iterator[None]:
    """Connected to the cluster in which a deployment runs. `address` "auto": a cluster on this machine; `http_port`: that of
    the deployment, if it is known. Raises ConfigError if there is none, or several and it is not clear which one is meant."""
    with joined(address if address != "auto" or "RAY_ADDRESS" in os.environ else _of_this_machine(http_port)):
        yield


def _of_this_machine(http_port: int | None) -> str:
    running = records()
    if not running:
        return "auto"
    fitting = [record for record in running if http_port in (None, record.http_port)]
    if len(fitting) == 1:
        return fitting[0].address
    which = "several deployments run here" if fitting else f"no deployment with router.http_port {http_port} runs here"
    listed = "".join(f"\n  {record}" for record in running)
    fix = "say which one" if fitting else "start it: prefillshare serve FILE"
    raise ConfigError(f"{which}; the running ones are:{listed}", fix=fix)


def running_handle():
    """The router's handle in the running application. Raises ConfigError if none runs."""
    from ray import serve

    try:
        return serve.get_deployment_handle(ROUTER, app_name=APP)
    except Exception as error:
        raise ConfigError("nothing is running there", fix="start it: prefillshare serve FILE") from error


def _start(**options) -> None:
    """Start Ray on this machine. A second attempt follows a failed one: a process of Ray's may end, or hang, before it reports
    itself."""
    for has_failed in (False, True):
        try:
            _init("local", "Ray did not start", "see the message; prefillshare doctor looks at this machine", **options)
            return
        except ConfigError as error:
            _end_half_started(error.__cause__)
            if has_failed:
                raise
            _log.warning("%s; trying once more", error.message)


def _init(address: str, failed: str, fix: str, field: str | None = None, **options) -> None:
    import ray

    ray_messages.log_instead_of_printing()
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            namespace=APP,
            configure_logging=False,
            **options,
        )
    except Exception as error:  # Ray has no common type for what goes wrong here
        raise ConfigError(f"{failed}: {type(error).__name__}: {error}", field=field, fix=fix) from error


def _end_half_started(error: BaseException) -> None:
    """End the processes of a node whose start failed: only the frames of that start know them, and Ray leaves them running."""
    import ray
    from ray._private.node import Node

    try:
        ray.shutdown()
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if isinstance(node := frame.f_locals.get("self"), Node):
                node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    except Exception:  # what matters is whether Ray starts now
        _log.warning("cannot end what is left of the failed start", exc_info=True)


def _close_token_file() -> None:
    """Make the token file private: Ray lets every user of the machine read the token that it makes."""
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    file = _get_default_token_path()
    with suppress(OSError):  # there is none, or it is not ours
        file.chmod(0o600)


def _named(address: str) -> tuple[str, int] | None:
    """Host and port in an address, or in RAY_ADDRESS if that takes its place; None: Ray finds the cluster by itself."""
    if address in ("auto", "local"):
        address = os.environ.get("RAY_ADDRESS") or address
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d+)", address)
    return (found[1], int(found[2])) if found else None


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), CONNECT_S):
            return True
    except OSError:
        return False
