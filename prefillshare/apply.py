"""`prefillshare apply FILE`: changes what runs into what the file says, while turns run.

1. Changes that are not possible at run time are refused.
2. The engines of the old and the new deployment run together; routers stay as they are. If an engine does not start, or cannot
   load an adapter, the old deployment's engines are restored, and the change is refused.
3. Routers take over the new deployment, or are replaced if they cannot (kvshare/live_changes.py). If a new router does not
   start, the old deployment is restored, as in 2.
4. Engines that the new deployment does not have are removed.
5. Every router is asked what it serves: the change is complete when all of them serve the new deployment.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prefillshare.app import (
    STOP_TIMEOUT_S,
    Progress,
    RunsAs,
    ailing,
    autoscaled,
    build,
    deploy,
    running_deployment,
    wait_until_running,
)
from prefillshare.argument_check import check_arguments
from prefillshare.cluster import APP, FOUND_S, joined, running_handle
from prefillshare.kvshare import decoders, live_changes
from prefillshare.kvshare.config import Deployment, load
from prefillshare.kvshare.errors import ConfigError, EngineStartError, PrefillShareError

#: Seconds that routers may take to say that they serve the new deployment, after Serve has said that they run.
CONFIRM_S = 60.0


def apply_command(file: Path, address: str | None = None) -> None:
    """`prefillshare apply FILE`: change the running deployment, and return when it has changed. `address`: of its Ray cluster,
    if the file's name does not say which deployment is meant."""
    from rich.console import Console

    from prefillshare import which
    from prefillshare.progress import startup_progress

    console = Console(stderr=True, soft_wrap=True)
    deployment = load(file)
    found = which.found(deployment.name, address or deployment.cluster.address)
    with joined(found.address) as at:
        handle = handle_to_change()
        with _answers("what it serves"):
            old = running_deployment(handle, FOUND_S)
        console.print(f"{old.name} at {at}: base {Path(old.base.model).name}", highlight=False)
        check_change(old, deployment)
        check_arguments(deployment).warn(console)
        with startup_progress(console) as progress:
            apply(deployment, progress)
            progress.done()
    console.print(f"decoders: {', '.join(decoders.served(deployment))}")


def apply(new: Deployment, progress: Progress | None = None) -> None:
    """Bring the running application in line with `new`; when this returns, what runs is what `new` says.

    No running turn is lost: engines take on additions before the router sends turns there, and drop removals after the router
    has stopped doing so. A part that was ailing before, which Serve goes on replacing, is not waited for. Raises ConfigError
    for what cannot change while it runs, or if nothing runs.
    """
    handle = handle_to_change()
    old = running_deployment(handle)
    check_change(old, new)
    before, after = RunsAs(old, handle.tenants.remote().result(timeout_s=STOP_TIMEOUT_S)), RunsAs.of(new)
    both, scaled, ill = _union(old, new), autoscaled(old), ailing()
    # All are built before any is deployed, so that errors in the new deployment's files are found first.
    fewer_engines, new_routers = build(new, after, scaled), build(both, after, scaled, check_files=False)
    more_engines, as_before = (build(deployment, before, scaled, check_files=False) for deployment in (both, old))
    try:
        _step(more_engines, new, progress, ill)
        _refuse_what_engines_cannot_load(handle, new)
        _step(new_routers, new, progress, ill)
        _refuse_what_routers_leave_out(handle, new)
    except PrefillShareError as error:
        _go_back(as_before, old, error, progress, ill)
        raise
    _step(fewer_engines, new, progress, ill)
    _confirm(handle, new)


def handle_to_change():
    """The running application. Raises ConfigError if nothing runs, or if somebody else says what does."""
    from prefillshare.serve_config import is_from_config

    handle = running_handle()
    if is_from_config(APP):
        raise ConfigError(
            "the running deployment came from a config file of Ray Serve (KubeRay)", fix="change it there, by helm upgrade"
        )
    return handle


def _step(application, deployment: Deployment, progress: Progress | None, ill: Collection[str]) -> None:
    deploy(application)
    wait_until_running(deployment, progress, ill)


def _refuse_what_engines_cannot_load(handle, new: Deployment) -> None:
    """Raises ConfigError naming every adapter that some replica cannot load, and why; EngineStartError if no router answers."""
    timeout_s = new.cluster.start_timeout_s + STOP_TIMEOUT_S
    with _answers(_LOADED):
        problems = handle.adapter_problems.remote(new.model_dump(mode="json")).result(timeout_s=timeout_s)
    _refuse(problems, new)


def _refuse_what_routers_leave_out(handle, new: Deployment) -> None:
    """The same check for what routers serve now: an engine may have been away when it was asked before."""
    with _answers(_LOADED):
        told = handle.broadcast("left_out").results(timeout_s=STOP_TIMEOUT_S)
    for left_out in told:
        _refuse(left_out, new)


_LOADED = "whether engines have loaded the adapters"


@contextmanager
def _answers(what: str) -> Iterator[None]:
    """Raises EngineStartError if no router says `what`."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except (TimeoutError, RayError, RayServeException) as error:
        raise EngineStartError(f"no router says {what}: {error}", fix="try again") from error


def _refuse(problems: Mapping[str, str], new: Deployment) -> None:
    """Raises ConfigError if adapters of `new` are among those with problems."""
    named = [
        (f"decode.{number}.adapters.{name}", f"engines cannot serve {folder}: {problems[name]}")
        for number, pool in enumerate(new.decode)
        for name, folder in pool.adapters.items()
        if name in problems
    ]
    if named:
        (field, message), *rest = named
        raise ConfigError(
            message + "".join(f"\n  {also}: {why}" for also, why in rest),
            field=field,
            fix="give an adapter that vLLM loads with this base; the previous deployment goes on",
        )


def _go_back(
    as_before, old: Deployment, error: PrefillShareError, progress: Progress | None, ill: Collection[str]
) -> None:
    try:
        _step(as_before, old, progress, ill)
    except PrefillShareError as second:
        message = f"{error}\nand the previous deployment has not come back: {second.message}"
        raise EngineStartError(message, fix="apply the previous file, or start anew") from error


def _confirm(handle, new: Deployment) -> None:
    """Wait until every router says that it serves `new`. Raises EngineStartError with what differs."""
    deadline = time.monotonic() + CONFIRM_S
    while True:
        answers = handle.broadcast("deployment").results(timeout_s=STOP_TIMEOUT_S)
        differing = sorted({field for plain in answers for field in differences(Deployment.model_validate(plain), new)})
        if not differing and len(answers) == new.router.replicas:
            return
        if time.monotonic() > deadline:
            what = ", ".join(differing) or f"{len(answers)} routers answer"
            raise EngineStartError(f"what runs differs from what the file says: {what}", fix="apply it again, or start anew")
        time.sleep(0.2)


def differences(one: Deployment, other: Deployment) -> list[str]:
    """Paths of the fields in which they differ, down to pools and sections."""
    mine, theirs = one.model_dump(mode="json"), other.model_dump(mode="json")
    found = []
    for section in mine:
        a, b = mine[section], theirs[section]
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{section}.{field}" for field in a if a[field] != b.get(field)]
        elif a != b:
            found.append(section)
    return found


def check_change(old: Deployment, new: Deployment) -> None:
    """Check that what runs may change from `old` to `new`. Names and KV blocks must keep their meaning: a turn that runs
    meanwhile must not meet other weights, or engines of two contracts. Raises ConfigError."""
    if old.name != new.name:
        raise ConfigError(
            f"the running deployment is called {old.name}",
            field="name",
            fix=f"start this one beside it: prefillshare serve FILE; or name it {old.name}, if it is to replace that one",
        )
    live_changes.refuse(old, new)
    kept, wanted = (decoders.ecache_layers(deployment.decode) for deployment in (old, new))
    if kept != wanted:
        raise ConfigError(
            f"the prefill pool keeps the inputs of layers {list(kept)}, but the new own_layers need those of {list(wanted)}",
            field="decode",
            fix="start anew, or start a second deployment; groups that begin at the same layers can change while it runs",
        )
    before = {pool.pool: pool for pool in old.decode}
    for number, pool in enumerate(new.decode):
        known = before.get(pool.pool)
        if known is None:
            continue
        live_changes.refuse(known, pool, f"decode.{number}.")
        for name in {*known.decoders} & {*pool.decoders}:
            runs, wants = (of.own_tokens.get(name, 1) for of in (known, pool))
            if runs != wants:
                raise ConfigError(
                    f"{name!r} computes the last {runs} tokens of a prompt itself; what is there now was trained for {wants}",
                    field=f"decode.{number}.own_tokens.{name}",
                    fix="give it another name, and a folder of its own",
                )
        for name, folder in pool.adapters.items():
            if known.adapters.get(name, folder) != folder:
                raise ConfigError(
                    f"adapter {name!r} is not the one that runs under this name ({known.adapters[name]})",
                    field=f"decode.{number}.adapters.{name}",
                    fix="give it another name",
                )


def _union(old: Deployment, new: Deployment) -> Deployment:
    """Everything that either deployment serves, in the sizes of the new one."""
    before = {pool.pool: pool for pool in old.decode}
    pools = [
        pool.model_copy(update={"adapters": {**before[pool.pool].adapters, **pool.adapters}}) if pool.pool in before else pool
        for pool in new.decode
    ]
    names = {pool.pool for pool in new.decode}
    gone = [pool for pool in old.decode if pool.pool not in names]
    prefill = new.shared_prefill or old.shared_prefill or new.prefill
    return new.model_copy(update={"decode": (*pools, *gone), "prefill": prefill})
