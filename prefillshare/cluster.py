"""The Ray cluster of a deployment: started for it on this machine or joined, by `serve` and by commands that ask what runs.

A deployment that starts its own cluster leaves a record of it (prefillshare/records.py). The address of one that is joined is
asked for an answer first (prefillshare/ray_address.py).

Seam: ray/_private/worker.py (`ray.init`), ray/_private/node.py (`Node`),
ray/_private/authentication/authentication_token_setup.py
"""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import NamedTemporaryFile

from prefillshare import forkserver, ray_address, ray_messages, records
from prefillshare.kvshare.config import Deployment
from prefillshare.kvshare.errors import ConfigError, Unavailable
from prefillshare.kvshare.loopback import ADDRESS, is_loopback
from prefillshare.local_ray import in_process_groups_of_their_own, loopback_kept
from prefillshare.records import Record
from prefillshare.within import within

_log = logging.getLogger(__name__)
#: Ray's namespace, and the Serve application's name.
APP = "prefillshare"
ROUTER = "router"
#: Seconds within which Ray Serve has to say whether it runs the application.
FOUND_S = 5.0
#: A local cluster's head does not come back. When it is gone, each process of the cluster ends after so many seconds, this one
#: too; by default after a minute.
_LOCAL = {"gcs_rpc_server_reconnect_timeout_s": 10}


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
    ray_messages.to_file()
    _enable_token_auth()  # Ray would do it with a warning that says how to opt out
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options = {"num_cpus": deployment.cluster.num_cpus, "include_dashboard": False, "_system_config": _LOCAL}
    if is_loopback(deployment.router.host):
        options["_node_ip_address"] = ADDRESS
    with forkserver.started(records.folder()) as labels:
        keep_token_private()
        with loopback_kept(deployment.router.host):
            _start(labels=labels, **options)
        try:
            with records.kept(Record.of(deployment, ray.get_runtime_context().gcs_address)):
                yield
        finally:
            ray.shutdown()


@contextmanager
def joined(address: str, field: str | None = None) -> Iterator[str]:
    """Join a running Ray cluster; "auto": the only one on this machine. Yields its address. Raises ConfigError, which names
    `field`, if it cannot be joined, and within seconds if nothing answers."""
    import ray

    address = _answering(address, field)
    with loopback_kept(ray_address.named(address)[0]):
        # A cluster answers there and Ray cannot join it. Ray does not say which of the two causes it is.
        _init(address, f"cannot join the Ray cluster at {address}", ray_address.TOKEN_FIX, field)
    try:
        yield address
    finally:
        ray.shutdown()


@contextmanager
def lent_to(deployment: Deployment) -> Iterator[None]:
    """The cluster at cluster.address, in which a deployment runs from now on."""
    with joined(deployment.cluster.address, "cluster.address") as address, records.kept(Record.of(deployment, address)):
        yield


def check(deployment: Deployment) -> None:
    """Raises ConfigError if the deployment cannot be started for what runs already: another one of its name, or no cluster at
    cluster.address."""
    records.refuse_taken(deployment.name)
    if deployment.cluster.address is not None:
        _answering(deployment.cluster.address, "cluster.address")


def _answering(address: str, field: str | None) -> str:
    """The address, or what "auto" stands for. Raises ConfigError if no cluster answers there."""
    ray_messages.to_file()
    address = ray_address.only_one(field) if address == "auto" else address
    ray_address.check(address, field)
    return address


def running_handle(limit_s: float | None = None):
    """The router's handle in the running application. Raises ConfigError if none runs, and Unavailable if Ray Serve does not
    answer within `limit_s`, by default FOUND_S."""
    from ray import serve

    try:
        return within(limit_s or FOUND_S, lambda: serve.get_deployment_handle(ROUTER, app_name=APP))
    except TimeoutError:
        raise Unavailable("Ray Serve does not answer", fix="look at Ray's logs; start the deployment anew") from None
    except Exception as error:
        raise ConfigError("nothing is running there", fix="start it: prefillshare serve FILE") from error


def _start(**options) -> None:
    """Start Ray on this machine. A second attempt follows a failed one: a process of Ray's may end, or hang, before it reports
    itself."""
    for has_failed in (False, True):
        try:
            with in_process_groups_of_their_own():
                _init("local", "Ray did not start", "see the message; prefillshare doctor looks at this machine", **options)
            return
        except ConfigError as error:
            _end_half_started(error.__cause__)
            if has_failed:
                raise
            _log.warning("%s; trying once more", error.message)


def _init(address: str, failed: str, fix: str, field: str | None = None, **options) -> None:
    import ray

    ray_messages.to_file()
    try:
        with warnings.catch_warnings(action="ignore"):
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.INFO,
                logging_format=ray_messages.FORM,
                namespace=APP,
                configure_logging=True,  # otherwise it would take its logger's handlers away
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


def keep_token_private() -> None:
    """Have a token before Ray makes one, which every user of the machine could read."""
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    file = _get_default_token_path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=file.parent, prefix=file.name) as made:  # nobody else may read it from the beginning on
        made.write(generate_new_authentication_token())
        made.flush()
        with suppress(OSError):  # there is one; or Ray makes it, where files cannot be linked
            os.link(made.name, file)
    with suppress(OSError):  # it is not ours
        file.chmod(0o600)
