"""Makes docs/configuration.md from the config tree: `python -m prefillshare.config_docs > docs/configuration.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from prefillshare import examples
from prefillshare.kvshare import config
from prefillshare.kvshare.config import access, changes, placement, tree
from prefillshare.kvshare.engine_settings import OUR_ENGINE_ARGS
from prefillshare.kvshare.modes import get_mode, mode_names
from prefillshare.router import tenants

_HEAD = """\
# Configuration

<!-- Made by `python -m prefillshare.config_docs > docs/configuration.md`; change kvshare/config/ instead. -->

One YAML file describes a deployment; `prefillshare check FILE` says what is wrong with it, and `prefillshare serve FILE`
runs it. Unknown keys are refused. All sizes are per replica. The last column says what a change does to a running
deployment (`prefillshare apply FILE`): "taken over" means that what runs adopts the new value without being replaced. What
turns notice of a change is described in [operations](operations.md#change-what-runs).
"""
_KEYS_FILE = """\
## The keys file

`router.auth.keys_file` names the keys file, or the environment variable `router.auth.keys_env` holds its content. It is YAML
or JSON with the mapping `tenants`, from a tenant's name to the keys below, and, if wanted, the list `operator_keys`. Unknown
keys are refused. Error messages show names only, never values. Example: [example.yaml](../deploy/keys/example.yaml).

`operator_keys` are keys of those who run the deployment, written like a tenant's. They belong to no tenant: they show the
figures of all tenants in the router's `/metrics`, and open nothing else.
"""
#: Where each node of the tree is in the file.
_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("base", config.Base),
    ("prefill", config.Prefill),
    ("decode[]", config.DecodePool),
    ("prefill.autoscale, decode[].autoscale", tree.Autoscale),
    ("router", config.Router),
    ("router.placement", placement.Placement),
    ("router.auth", access.Auth),
    ("router.tls", access.Tls),
    ("cluster", config.Cluster),
    ("logs", config.Logs),
    ("tracing", config.Tracing),
)


def markdown() -> str:
    """The whole page."""
    parts = [_HEAD, "## Sharing modes\n\nValues of `decode[].sharing`.\n", _table(("mode", "meaning"), _modes())]
    parts += ["## The file\n", fields(config.Deployment)]
    for path, node in _SECTIONS:
        parts += [f"## `{path}`\n\n{inspect.cleandoc(node.__doc__)}\n", fields(node)]
    refused = ", ".join(f"`{name}`" for name in sorted(OUR_ENGINE_ARGS))
    parts += [f"## `engine_args`\n\nArguments of vLLM's engine, passed on as they are. The following are refused, because "
              f"fields above or the KV contract decide them:\n{refused}.\n"]
    parts += [_KEYS_FILE, fields(tenants.Tenant)]
    parts += ["## Examples\n\nThe files are in `deploy/configs/`, one per scenario.\n"]
    parts += [_table(("file", "scenario"), _examples())]
    return "\n".join(parts)


def _modes() -> Iterator[tuple[str, ...]]:
    return ((f"`{name}`", get_mode(name).summary) for name in mode_names())


def _examples() -> Iterator[tuple[str, ...]]:
    for name, scenario in examples.scenarios().items():
        yield f"[{name}.yaml](../deploy/configs/{name}.yaml)", scenario


def fields(node: type[BaseModel]) -> str:
    """A table of a node's keys."""
    schema = node.model_json_schema()
    required = schema.get("required", ())
    does = {name: change.does if change else "" for name, change in changes.of(node).items()}
    head = ("key", "values", "default", "meaning", *(["a change"] if any(does.values()) else []))
    rows = (
        (f"`{name}`", _values(item), "**required**" if name in required else _default(item), item["description"], does[name])
        for name, item in schema["properties"].items()
    )
    return _table(head, (row[: len(head)] for row in rows))


def _values(item: dict[str, Any]) -> str:
    """Type and range, from a field's JSON schema."""
    if "anyOf" in item:
        return " or ".join(_values(choice) for choice in item["anyOf"] if choice.get("type") != "null")
    if "enum" in item:
        return ", ".join(f"`{value}`" for value in item["enum"] if value is not False)  # what a bare `off` is in YAML
    if "$ref" in item:
        return "mapping"
    kinds = {"array": "list", "boolean": "`true`, `false`", "object": "mapping"}
    kind = kinds.get(item["type"], item["type"])
    bounds = [f"{sign} {item[key]:g}" for key, sign in _BOUNDS if key in item]
    return ", ".join([kind, *bounds]) + (f", `{item['pattern']}`" if "pattern" in item else "")


_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="))


def _default(item: dict[str, Any]) -> str:
    value = item.get("default", {})  # without a default in the schema, it is a mapping
    if value is None:
        return "unset"
    shown = str(value).lower() if isinstance(value, bool) else f"{value:.15g}" if isinstance(value, float) else str(value)
    return f"`{shown}`"


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(head), line(("---",) * len(head)), *map(line, rows)]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
