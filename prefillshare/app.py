"""Config -> Serve application, and its life: check, start, wait until ready, stop.

`running(deployment)` is what `serve`, the demo, tests and benchmarks all use.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvshare import decoders
from kvshare.config import Deployment, load
from kvshare.errors import ConfigError, EngineStartError
from prefillshare.engines import engine_settings
from prefillshare.platform import engine_environment, on_cpu
from prefillshare.preflight import check_machine
from prefillshare.serve_http import check_proxies, http_options, proxy_environment
from router import tenants

logger = logging.getLogger(__name__)

APP = "prefillshare"
ROUTER = "router"
#: Serve's patience with a stopping replica, over the router's with its turns (router.ingress.GRACE_S).
STOP_TIMEOUT_S = 40.0

#: Called with (seconds since start, deployment name -> state) while waiting.
Progress = Callable[[float, dict[str, str]], None]


def build(deployment: Deployment):
    """The Serve application of a deployment. Raises ConfigError or ContractMismatch before anything starts."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from decode_service.service import DecodeService
    from prefill_service.service import PrefillService
    from router.ingress import RouterIngress
    from router.pinned import PinnedRouter

    prefill, decode = {}, {}
    env = engine_environment()
    for name, (settings, engines) in engine_settings(deployment).items():
        service, handles = (PrefillService, prefill) if settings.role == "prefill" else (DecodeService, decode)
        handles[name] = serve.deployment(
            service,
            name=name,
            num_replicas=engines.replicas,
            max_ongoing_requests=4 * engines.max_num_seqs,
            max_constructor_retry_count=1,
            health_check_period_s=2,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=STOP_TIMEOUT_S,
            graceful_shutdown_wait_loop_s=0.2,
            request_router_config=RequestRouterConfig(request_router_class=PinnedRouter),
            ray_actor_options={
                "num_cpus": 0.01 if on_cpu() else 1,
                "num_gpus": 0 if on_cpu() else engines.tensor_parallel_size * engines.gpu_share,
                "runtime_env": {"env_vars": env},
            },
        ).bind(settings)
    router = deployment.router
    return serve.deployment(
        RouterIngress,
        name=ROUTER,
        num_replicas=router.replicas,
        # HTTP requests beyond this wait in Serve's proxy; the router itself refuses at max_queued, with a reason.
        max_ongoing_requests=4 * router.max_queued,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=STOP_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={
            "num_cpus": 0.01,
            "runtime_env": {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "0", "OMP_NUM_THREADS": "1"}},
        },
    ).bind(deployment, prefill, decode, tenants.load(deployment.router.auth))


@contextmanager
def running(deployment: Deployment, progress: Progress | None = None) -> Iterator[object]:
    """Start a deployment; yields the router's handle when every pool has served a turn. Stops everything at the end.

    Raises ConfigError, ContractMismatch or EngineStartError (with the end of the engine's log).
    """
    import ray
    from ray import serve

    engine_settings(deployment)  # files first: the cheapest refusals
    tenants.load(deployment.router.auth)
    check_machine(deployment)
    cluster, owned = deployment.cluster, False
    if not ray.is_initialized():
        owned = cluster.address is None
        with proxy_environment(deployment.router):
            _connect(deployment, owned)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options=http_options(deployment.router))
        check_proxies(deployment.router)
        serve.run_many([serve.RunTarget(build(deployment), name=APP, route_prefix="/")], wait_for_applications_running=False)
        _wait_until_running(deployment, progress)
        handle = serve.get_app_handle(APP)
        try:
            yield handle
        finally:
            _drain(handle)
            handle.shutdown()
    finally:
        if owned:
            serve.shutdown()
            ray.shutdown()
        elif APP in serve.status().applications:
            serve.delete(APP)  # a cluster of others: their applications stay


def _connect(deployment: Deployment, local: bool) -> None:
    """Start a local Ray cluster that listens where the router does, or join the one at `cluster.address`."""
    import ray

    host, options = deployment.router.host, {}
    if local:
        options = {"num_cpus": deployment.cluster.num_cpus, "include_dashboard": False}
        if host == "127.0.0.1":
            options["_node_ip_address"] = host
    try:
        ray.init(
            address=deployment.cluster.address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            namespace=APP,
            configure_logging=False,
            **options,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        what = "Ray did not start" if local else f"cannot reach a Ray cluster at {deployment.cluster.address}"
        raise ConfigError(
            f"{what}: {error}",
            field=None if local else "cluster.address",
            fix="see the message" if local else "start Ray there, or leave the field out for a local cluster",
        ) from error


def _drain(handle) -> None:
    from router.ingress import GRACE_S

    try:
        handle.drain.remote(GRACE_S).result(timeout_s=STOP_TIMEOUT_S)
    except Exception as error:  # the cluster is going down whatever happens here
        logger.warning("The router did not drain: %s: %s", type(error).__name__, error)


def _wait_until_running(deployment: Deployment, progress: Progress | None) -> None:
    from ray import serve

    started = time.monotonic()
    while True:
        status = serve.status().applications[APP]
        elapsed = time.monotonic() - started
        if progress:
            progress(elapsed, {name: d.status.value for name, d in status.deployments.items()})
        if status.status.value == "RUNNING":
            return
        unhealthy = {n: d.message for n, d in status.deployments.items() if d.status.value in ("UNHEALTHY", "DEPLOY_FAILED")}
        if status.status.value in ("DEPLOY_FAILED", "UNHEALTHY") or unhealthy:
            text = "\n".join(f"{name}: {message}" for name, message in unhealthy.items() if message) or status.message
            raise EngineStartError(f"the deployment did not start:\n{text}")
        if elapsed > deployment.cluster.start_timeout_s:
            waiting = ", ".join(
                f"{n} is {d.status.value}" for n, d in status.deployments.items() if d.status.value != "HEALTHY"
            )
            raise EngineStartError(f"not ready after {elapsed:.0f} s: {waiting}", fix="raise cluster.start_timeout_s")
        time.sleep(0.2)


def serve_command(file: Path) -> None:
    """`prefillshare serve FILE`: run until SIGINT or SIGTERM, then finish running turns and stop."""
    import signal
    import threading

    from rich.console import Console

    from prefillshare.progress import startup_progress

    console = Console(stderr=True)
    deployment = load(file)
    stop = threading.Event()
    with startup_progress(console) as progress, running(deployment, progress):
        # Not before: until here a signal ends the start-up, and Ray has set handlers of its own.
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, lambda *_: stop.set())
        progress.done()
        r = deployment.router
        scheme = "https" if r.tls else "http"
        console.print(f"[green]ready[/]  OpenAI: {scheme}://{r.host}:{r.http_port}/v1   gRPC: {r.host}:{r.grpc_port}")
        console.print(f"decoders: {', '.join(decoders.served(deployment))}   (Ctrl-C finishes running turns and stops)")
        stop.wait()
        console.print("stopping: finishing running turns ...")
    console.print("stopped")
