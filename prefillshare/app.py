"""Config -> Serve application, and its life: check, start, wait until ready, stop.

`running(deployment)` is what `serve`, the demo, tests and benchmarks all use.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvshare import decoders
from kvshare.config import Deployment, Engines, Router, load, parse
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


def build(deployment: Deployment, served: Deployment | None = None, scaled: Collection[str] = ()):
    """The Serve application of a deployment. Raises ConfigError or ContractMismatch before anything starts.

    `served`: what the router serves of it, if that is not all. `scaled`: engines that run and have followed their load.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from decode_service.service import DecodeService
    from prefill_service.service import PrefillService
    from router.ingress import RouterIngress
    from router.pinned import PinnedRouter

    handles, env = {}, engine_environment()
    for name, (settings, engines) in engine_settings(deployment).items():
        engine = serve.deployment(
            PrefillService if settings.role == "prefill" else DecodeService,
            name=name,
            user_config={"adapters": dict(settings.adapters), "log_level": settings.log_level},
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
                "runtime_env": {"env_vars": env},
            },
        )
        fixed = replace(settings, adapters={}, log_level=""), bool(settings.adapters)
        handles[name] = _kept_while(engine, fixed).bind(settings)
    router = deployment.router
    ingress = serve.deployment(
        RouterIngress,
        name=ROUTER,
        num_replicas=router.replicas,
        user_config=(served or deployment).model_dump(mode="json"),
        # HTTP requests beyond this wait in Serve's proxy; the router itself refuses at max_queued, with a reason.
        max_ongoing_requests=4 * router.max_queued,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=STOP_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={
            "num_cpus": 0.01,
            "resources": dict(router.resources),
            "runtime_env": {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "0", "OMP_NUM_THREADS": "1"}},
        },
    )
    known = tenants.load(router.auth)
    return _kept_while(ingress, (_fixed(deployment), known.fingerprint)).bind(served or deployment, handles, known)


def _replicas(engines: Engines, as_scaled: bool) -> dict:
    if engines.autoscale is None:
        return {"num_replicas": engines.replicas}
    scale = engines.autoscale
    return {
        "autoscaling_config": {
            "min_replicas": scale.min_replicas,
            # Serve would go back to it at every change.
            "initial_replicas": None if as_scaled else engines.replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_calls,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
        }
    }


def application(args: dict[str, Any]):
    """For Ray Serve's own config files, as KubeRay's RayService has them: `import_path: prefillshare.app:application`, `args:
    {deployment: {...}}`, a deployment file's content. Changed args change what runs, as `apply` would. Raises as `build` does,
    and ConfigError for what cannot change while it runs."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    deployment, scaled = parse(args.get("deployment")), []
    try:
        old = _running_deployment(running_handle())
    except (ConfigError, TimeoutError, RayError, RayServeException) as error:
        # Nothing runs, or no router came up: it may be replaced. (Serve does not tell its status while it builds.)
        logger.info("no router answers: %s", error)
    else:
        check_change(old, deployment)
        scaled = _autoscaled(old)
    return build(deployment, scaled=scaled)


def _kept_while(part, settings: object):
    """Serve keeps a deployment's replicas when the application is deployed again, unless `settings` have changed."""
    from prefillshare.serve_config import keep_version

    part._version = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    part._deployment_config = keep_version(part._deployment_config, part._version)
    return part


def _fixed(deployment: Deployment) -> object:
    """What of a deployment a running router cannot take over: it is replaced instead, turn by turn."""
    router = deployment.router.model_dump(exclude=set(Router.CHANGEABLE) | {"replicas"})
    return deployment.base, deployment.cluster.kv_load_timeout_s, deployment.logs.format, deployment.tracing, router


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


def apply(new: Deployment, progress: Progress | None = None) -> None:
    """Bring the running application in line with `new`: replica counts, adapters, decode pools, the router's limits.

    Nothing that runs is lost: engines take on what comes before the router sends to it, and drop what goes after the
    router has stopped. Raises ConfigError if the base or TLS would change, or nothing runs.
    """
    from ray import serve

    from prefillshare.serve_config import is_from_config

    handle = running_handle()
    if is_from_config(APP):
        raise ConfigError(
            "what runs was deployed from a config file of Ray Serve's (KubeRay)", fix="change it there, by helm upgrade"
        )
    old = _running_deployment(handle)
    check_change(old, new)
    both, scaled = _union(old, new), _autoscaled(old)
    for application in (build(both, old, scaled), build(both, new, scaled), build(new, scaled=scaled)):
        serve.run_many([serve.RunTarget(application, name=APP, route_prefix="/")], wait_for_applications_running=False)
        _wait_until_running(new, progress)


def check_change(old: Deployment, new: Deployment) -> None:
    """Of what runs. A name means the same before and after, and so does a block: a turn that runs meanwhile must not meet other
    weights, nor engines of two contracts. Raises ConfigError."""
    if old.base != new.base:
        raise ConfigError("the base cannot change while it runs", field="base", fix="start a second deployment")
    for field in ("address", "num_cpus"):
        if getattr(old.cluster, field) != getattr(new.cluster, field):
            raise ConfigError("it runs on another cluster", field=f"cluster.{field}", fix="start a second deployment there")
    if old.router.tls != new.router.tls:
        raise ConfigError("Ray Serve's proxies keep their certificates while they run", field="router.tls", fix="start anew")
    for field in ("host", "http_port"):
        if getattr(old.router, field) != getattr(new.router, field):
            raise ConfigError(
                "Ray Serve's proxies keep listening where they do while they run", field=f"router.{field}", fix="start anew"
            )
    kept, wanted = (decoders.ecache_layers(deployment.decode) for deployment in (old, new))
    if kept != wanted:
        raise ConfigError(
            f"the prefill pool keeps the inputs of layers {list(kept)}, the new own_layers need those of {list(wanted)}",
            field="decode",
            fix="start anew, or a second deployment; groups that begin at the same layers can change while it runs",
        )
    before = {pool.pool: pool for pool in old.decode}
    for number, pool in enumerate(new.decode):
        known = before.get(pool.pool)
        if known and (known.model, known.sharing) != (pool.model, pool.sharing):
            raise ConfigError(
                f"pool {pool.pool!r} has another model or sharing mode than the one that runs",
                field=f"decode.{number}",
                fix="give it another name",
            )
        for name, folder in pool.adapters.items():
            if known and known.adapters.get(name, folder) != folder:
                raise ConfigError(
                    f"adapter {name!r} is another one than the one that runs ({known.adapters[name]})",
                    field=f"decode.{number}.adapters.{name}",
                    fix="give it another name",
                )


def _autoscaled(deployment: Deployment) -> list[str]:
    return [name for name, (_, engines) in engine_settings(deployment).items() if engines.autoscale]


def _running_deployment(handle) -> Deployment:
    return Deployment.model_validate(handle.deployment.remote().result(timeout_s=STOP_TIMEOUT_S))


def _union(old: Deployment, new: Deployment) -> Deployment:
    """Everything either serves, in the new one's sizes."""
    before = {pool.pool: pool for pool in old.decode}
    pools = [
        pool.model_copy(update={"adapters": {**before[pool.pool].adapters, **pool.adapters}}) if pool.pool in before else pool
        for pool in new.decode
    ]
    names = {pool.pool for pool in new.decode}
    return new.model_copy(update={"decode": (*pools, *(p for p in old.decode if p.pool not in names))})


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
        handle.broadcast("drain", GRACE_S).results(timeout_s=STOP_TIMEOUT_S)
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


def apply_command(file: Path) -> None:
    """`prefillshare apply FILE`: change the deployment that runs, and return when it has changed."""
    from rich.console import Console

    from prefillshare.progress import startup_progress

    console = Console(stderr=True)
    deployment = load(file)
    with connected(deployment.cluster.address or "auto"), startup_progress(console) as progress:
        apply(deployment, progress)
        progress.done()
    console.print(f"decoders: {', '.join(decoders.served(deployment))}")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """To the Ray cluster in which a deployment runs. Raises ConfigError if there is none."""
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, namespace=APP, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no Ray cluster runs at {address}: {error}", fix="start it: prefillshare serve FILE") from error
    try:
        yield
    finally:
        ray.shutdown()


def running_handle():
    """The router's, of the application that runs. Raises ConfigError if none does."""
    from ray import serve

    try:
        return serve.get_deployment_handle(ROUTER, app_name=APP)
    except Exception as error:
        raise ConfigError("nothing is running there", fix="start it: prefillshare serve FILE") from error
