"""Which deployment a command speaks to: the one that it is told, or the only one there is. If there are several, the user is
asked, or told how to say which."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefillshare import ray_address, records
from prefillshare.kvshare.errors import ConfigError
from prefillshare.records import Record

_START = "start it: prefillshare serve FILE"


@dataclass(frozen=True)
class Found:
    """`record`: what is known of it on this machine; None for a deployment that was started elsewhere or by somebody else."""

    address: str
    record: Record | None = None


def found(name: str | None, address: str | None, ask: Callable[[Sequence[str]], int] | None = None) -> Found:
    """The deployment at this address of a Ray cluster ("auto" is the same as None), of this name, at the address in the
    environment, or the only one; in this order. `ask`: has the user choose one of several lines, and returns its number; None:
    the user is asked if there is a terminal. Raises ConfigError."""
    running = records.records()
    fitting = [record for record in running if name in (None, record.name)]
    if address in (None, "auto"):
        address = None if name and fitting else ray_address.from_environment()
    if address:
        return Found(address, next((record for record in running if record.address == address), None))
    if fitting:
        how = f"--name {fitting[0].name}"
        record = fitting[_chosen("deployments", fitting, how, ask)]
        return Found(record.address, record)
    if running:
        raise ConfigError(f"no deployment {name!r} runs on this machine; these do:{_listed(running)}", field="name", fix=_START)
    clusters = ray_address.on_this_machine()
    if not clusters:
        raise ConfigError("no deployment runs on this machine", fix=f"{_START}; or say where its Ray cluster is: --address")
    return Found(clusters[_chosen("Ray clusters", clusters, f"--address {clusters[0]}", ask)])


def _chosen(kind: str, options: Sequence[object], how: str, ask: Callable[[Sequence[str]], int] | None) -> int:
    """The number of the chosen one."""
    if len(options) == 1:
        return 0
    if ask is None and sys.stdin.isatty() and sys.stderr.isatty():
        ask = _at_the_terminal
    if ask is None:
        raise ConfigError(f"{len(options)} {kind} run on this machine:{_listed(options)}", fix=f"say which one, like {how}")
    return ask([str(option) for option in options])


def _at_the_terminal(lines: Sequence[str]) -> int:
    import typer

    for number, line in enumerate(lines, 1):
        typer.echo(f"  {number}  {line}", err=True)
    while not 1 <= (number := typer.prompt("Which one", type=int, err=True)) <= len(lines):
        typer.echo(f"A number from 1 to {len(lines)}.", err=True)
    return number - 1


def _listed(options: Sequence[object]) -> str:
    return "".join(f"\n  {option}" for option in options)
