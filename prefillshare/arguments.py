"""What commands have in common: how they are grouped, and the arguments and options that name files or folders.

Each file or folder is checked (kvshare/given_files.py) while the command line is read, so that no command begins work, or
imports what takes seconds, before it has what it needs.

What a command does not need in every case it checks itself, by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from prefillshare.kvshare import given_files


def checked(check: Callable[[Path, str], None]) -> Callable[..., Any]:
    """A callback of typer's: `check` gets the path, or each of several, and the name of the argument or option."""

    def callback(ctx: typer.Context, param: typer.CallbackParam, value: Path | list[Path] | None) -> Path | list[Path] | None:
        if value is not None and not ctx.resilient_parsing:
            for path in value if isinstance(value, list) else [value]:
                check(path, _name(param))
        return value

    return callback


def _name(param: Any) -> str:
    """As a user writes it: --base, DECODER."""
    return param.opts[0] if param.opts[0].startswith("-") else (param.metavar or param.name.upper()).removesuffix("...")


DeploymentFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="Deployment file (YAML).", callback=checked(given_files.readable))
]
BaseFolder = Annotated[Path, typer.Option("--base", help="Folder of the base model.", callback=checked(given_files.model))]
DecoderFolder = Annotated[
    Path,
    typer.Argument(
        metavar="DECODER", help="Folder of a LoRA adapter or of a fine-tuned model.", callback=checked(given_files.weights)
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        help="Chat template used instead of the base's own: a file, or a name as in base.chat_template.",
        show_default="the base's own",
    ),
]


def group(help: str, **options: Any) -> typer.Typer:
    """A command line, or a group of its commands."""
    return typer.Typer(help=help, no_args_is_help=True, rich_markup_mode="markdown", add_completion=False,
                       context_settings={"help_option_names": ["-h", "--help"]}, **options)
