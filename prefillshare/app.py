"""Builds the Serve application of a deployment, and runs it: check, start, wait until ready, stop.

`serve`, the demo, tests and benchmarks all use `running(deployment)`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from prefillshare import cluster, forkserver, records
from prefillshare.argument_check import check_arguments
from prefillshare.cluster import APP, ROUTER
from prefillshare.engines import engine_settings
from prefillshare.kvshare import addresses, decoders, live_changes
from prefillshare.kvshare.config import Deployment, Engines, load, parse
from prefillshare.kvshare.errors import ConfigError, EngineStartError, PrefillShareError
from prefillshare.platform import OFFLINE, engine_environment, on_cpu
from prefillshare.preflight import check_machine
from prefillshare.router import tenants
from prefillshare.router.tenants import Tenants
from prefillshare.serve_http import check_proxies, http_options, proxy_environment
from prefillshare.watch import Watch

logger = logging.getLogger(__name__)

#: Seconds that Serve gives a replica to stop; more than the router gives its turns (router.ingress.GRACE_S).
STOP_TIMEOUT_S = 40.0

#: Signals that come within so many seconds are one.
TWICE_S = 0.25
#: Called with (seconds since start, deployment name -> state) while waiting.
Progress = Callable[[float, dict[str, str]], None]


@dataclass(frozen=True)
class RunsAs:
    """What routers are started with: the deployment that they serve, and its tenants."""

    deployment: Deployment
    tenants: Tenants

    @classmethod
    def of(cls, deployment: Deployment) -> RunsAs:
        return cls(deployment, tenants.load(deployment.router.auth))

    @property
    def version(self) -> object:
        """Routers are replaced when this changes; they take over everything else while they run."""
        return live_changes.fixed_for_router(self.deployment), self.tenants.fingerprint


def build(
    deployment: Deployment, routers: RunsAs | None = None, scaled: Collection[str] = (), check_files: bool = True
):
    """The Serve application of a deployment. Raises ConfigError or ContractMismatch before anything starts.

    `routers`: what routers serve, if that differs from `deployment`. `scaled`: names of running engines that follow their load.
    `check_files`: check the decoders' files, which is not needed if they run already.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from prefillshare.decode_service.service import DecodeService
    from prefillshare.prefill_service.service import PrefillService
    from prefillshare.router.ingress import RouterIngress
    from prefillshare.router.pools.pinned import PinnedRouter

    handles, env = {}, OFFLINE | engine_environment()
    for name, (settings, engines) in engine_settings(deployment, check_files).items():
        spares = int(settings.tensor_parallel_size == 1)  # with several ranks, each imports vLLM nevertheless
        engine = serve.deployment(
            PrefillService if settings.role == "prefill" else DecodeService,
            name=name,
            user_config=settings.changeable,
            **_replicas(engines, name in scaled),
            max_ongoing_requests=4 * engines.max_num_seqs,
            max_constructor_retry_count=1,
            health_check_period_s=1,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=STOP_TIMEOUT_S + deployment.cluster.kv_lease_s,
            graceful_shutdown_wait_loop_s=0.2,
            request_router_config=RequestRouterConfig(request_router_class=PinnedRouter),
            logging_config={"enable_access_log": False},
            ray_actor_options={
                "num_cpus": 0.01 if on_cpu() else 1,
                "num_gpus": 0 if on_cpu() else engines.tensor_parallel_size * engines.gpu_share,
                "resources": dict(engines.resources),
                "runtime_env": {"env_vars": env, **forkserver.runtime_env(records.folder(), spares)},
            },
        )
        handles[name] = _kept_while(engine, settings.fixed).bind(settings)
    routers = routers or RunsAs.of(deployment)
    router = routers.deployment.router
    ingress = serve.deployment(
        RouterIngress,
        name=ROUTER,
        num_replicas=router.replicas,
        user_config=routers.deployment.model_dump(mode="json"),
        # HTTP requests beyond this wait in Serve's proxy; the router itself refuses at max_queued, with a reason.
        max_ongoing_requests=4 * router.max_queued,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=STOP_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={
            "num_cpus": 0.01,
            "resources": dict(router.resources),
            "runtime_env": {
                "env_vars": OFFLINE | {"VLLM_CPU_KVCACHE_SPACE": "0", "OMP_NUM_THREADS": "1"},
                **forkserver.runtime_env(records.folder()),
            },
        },
    )
    return _kept_while(ingress, routers.version).bind(routers.deployment, handles, routers.tenants)


def _replicas(engines: Engines, as_scaled: bool) -> dict:
    if engines.autoscale is None:
        return {"num_replicas": engines.replicas}
    scale = engines.autoscale
    return {
        "autoscaling_config": {
            "min_replicas": scale.min_replicas,
            # Serve would go back to this number at every change.
            "initial_replicas": None if as_scaled else engines.replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_calls,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
        }
    }


def application(args: dict[str, Any]):
    """The application for Ray Serve's own config files, as KubeRay's RayService has them: `import_path:
    prefillshare.app:application`, `args: {deployment: {...}}` with the content of a deployment file. Changed args change what
    runs, as `apply` would. Raises as `build` does, and ConfigError for what cannot change while it runs."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from prefillshare.apply import check_change

    deployment, scaled = parse(args.get("deployment")), []
    try:
        old = running_deployment(cluster.running_handle(STOP_TIMEOUT_S))
    except (ConfigError, TimeoutError, RayError, RayServeException) as error:
        # Nothing runs, or no router came up: the application may be replaced. (Serve tells no status while it builds one.)
        logger.info("no router answers: %s", error)
    else:
        check_change(old, deployment)
        scaled = autoscaled(old)
    return build(deployment, scaled=scaled)


def _kept_while(part, settings: object):
    """Serve keeps a deployment's replicas when the application is deployed again, unless `settings` have changed."""
    from prefillshare.serve_config import keep_version

    part._version = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    part._deployment_config = keep_version(part._deployment_config, part._version)
    return part


@contextmanager
def running(deployment: Deployment, progress: Progress | None = None) -> Iterator[object]:
    """Start a deployment; yields the router's handle when every pool has served a turn. Stops everything at the end.

    Raises ConfigError, ContractMismatch or EngineStartError (with the end of the engine's log).
    """
    import ray
    from ray import serve

    from prefillshare.kvshare_vllm.engine.ray_node import channel_secret

    if not ray.is_initialized():
        cluster.check(deployment)
    engine_settings(deployment)
    tenants.load(deployment.router.auth)
    check_machine(deployment)
    with ExitStack() as until_the_end:
        owned = False
        if not ray.is_initialized():
            owned = deployment.cluster.address is None
            with proxy_environment(deployment.router):
                until_the_end.enter_context(cluster.started(deployment) if owned else cluster.lent_to(deployment))
                if not owned:
                    _refuse_to_replace_another(deployment.name)
            channel_secret()  # raises early what each replica would raise
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        until_the_end.callback(_end, owned)
        serve.start(http_options=http_options(deployment.router))
        check_proxies(deployment.router)
        deploy(build(deployment))
        wait_until_running(deployment, progress)
        handle = serve.get_app_handle(APP)
        try:
            yield handle
            _drain(handle)  # not after a failure: then there may be no router to wait for
        finally:
            handle.shutdown()


def _refuse_to_replace_another(name: str) -> None:
    """Raises ConfigError if the joined cluster runs a deployment of another name: a cluster holds one at a time."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        running = running_deployment(cluster.running_handle()).name
    except (PrefillShareError, TimeoutError, RayError, RayServeException):  # nothing runs there, or nothing that answers
        return
    if running != name:
        raise ConfigError(
            f"the Ray cluster at cluster.address runs the deployment {running!r}, which would be replaced",
            field="name",
            fix=f"give another cluster, end that deployment, or name this one {running}",
        )


def _end(owned: bool) -> None:
    from ray import serve

    if owned:
        serve.shutdown()
    elif APP in serve.status().applications:
        serve.delete(APP)  # the cluster is not ours: other applications stay


def deploy(application) -> None:
    """Replace what runs by the application. Does not wait."""
    from ray import serve

    serve.run_many([serve.RunTarget(application, name=APP, route_prefix="/")], wait_for_applications_running=False)


def autoscaled(deployment: Deployment) -> list[str]:
    """Names of those engines of a running deployment that follow their load."""
    return [name for name, (_, engines) in engine_settings(deployment, check_files=False).items() if engines.autoscale]


def running_deployment(handle, timeout_s: float = STOP_TIMEOUT_S) -> Deployment:
    """The deployment that a running router says it serves. Raises TimeoutError, or one of Ray's errors."""
    return Deployment.model_validate(handle.deployment.remote().result(timeout_s=timeout_s))


def _drain(handle) -> None:
    from prefillshare.router.ingress import GRACE_S

    try:
        handle.broadcast("drain", GRACE_S).results(timeout_s=STOP_TIMEOUT_S)
    except Exception as error:  # the cluster is going down whatever happens here
        logger.warning("The router did not drain: %s: %s", type(error).__name__, error)


#: What Serve says of deployments whose replicas do not work.
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def ailing() -> frozenset[str]:
    """Names of those parts of the running application whose replicas do not all work. Serve goes on replacing them."""
    from ray import serve

    application = serve.status().applications.get(APP)
    deployments = application.deployments if application else {}
    return frozenset(name for name, deployment in deployments.items() if deployment.status.value in _FAILED)


def wait_until_running(deployment: Deployment, progress: Progress | None, ailing: Collection[str] = ()) -> None:
    """Raises EngineStartError if the application does not come to run. What was `ailing` before does not count: it is not the
    change that ails it, and a change may be what it needs."""
    from ray import serve

    started = time.monotonic()
    while True:
        status = serve.status().applications[APP]
        elapsed = time.monotonic() - started
        if progress:
            progress(elapsed, {name: d.status.value for name, d in status.deployments.items()})
        # The application's state is that of its worst deployment. Right after a change, deployments may have an earlier state.
        if status.status.value == "RUNNING":
            return
        if status.status.value in _FAILED:
            counted = {n: d for n, d in status.deployments.items() if n not in ailing}
            failed = {n: d.message for n, d in counted.items() if d.status.value in _FAILED}
            if failed or not ailing:
                text = "\n".join(f"{name}: {message}" for name, message in failed.items() if message) or status.message
                raise EngineStartError(f"the deployment did not start:\n{text}")
            if all(d.status.value == "HEALTHY" for d in counted.values()):
                return
        if elapsed > deployment.cluster.start_timeout_s:
            waiting = ", ".join(
                f"{n} is {d.status.value}" for n, d in status.deployments.items() if d.status.value != "HEALTHY"
            )
            raise EngineStartError(f"not ready after {elapsed:.0f} s: {waiting}", fix="raise cluster.start_timeout_s")
        time.sleep(0.2)


def serve_command(file: Path) -> None:
    """`prefillshare serve FILE`: run until SIGINT or SIGTERM, then finish running turns and stop; at a second one, end at once
    with status 130, if the Ray cluster is our own, which ends with us.

    Raises Unavailable if what was started is gone before that, or does not come back.
    """
    import signal

    from rich.console import Console

    from prefillshare.progress import startup_progress

    console = Console(stderr=True)
    deployment = load(file)
    cluster.check(deployment)
    check_arguments(deployment).warn(console)
    stop = Event()

    is_own, told_at = deployment.cluster.address is None, math.inf

    def told(*_) -> None:
        nonlocal told_at
        # Shells and `timeout` may send one signal twice. No exception: Ray, which it would interrupt anywhere, crashes.
        if is_own and time.monotonic() > told_at + TWICE_S:
            os._exit(130)
        told_at = min(told_at, time.monotonic())
        stop.set()

    with startup_progress(console) as progress, running(deployment, progress):
        # Not earlier: until here a signal ends the start-up, and Ray has set its own handlers.
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, told)
        progress.done()
        r = deployment.router
        scheme = "https" if r.tls else "http"
        http, grpc = (addresses.joined(r.host, port) for port in (r.http_port, r.grpc_port))
        console.print(f"[green]ready[/]  {deployment.name}   OpenAI: {scheme}://{http}/v1   gRPC: {grpc}", highlight=False)
        if r.ui != "off":
            console.print(f"page: {scheme}://{http}/ui", highlight=False)
        console.print(f"decoders: {', '.join(decoders.served(deployment))}   (Ctrl-C finishes running turns and stops)")
        with Watch(deployment.cluster.start_timeout_s, stop) as watch:
            stop.wait()
        watch.check()
        console.print(f"stopping: finishing running turns ...{' (Ctrl-C again cuts them off)' if is_own else ''}")
    console.print("stopped")
