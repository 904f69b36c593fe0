"""`prefillshare contract`: which base a decoder was trained against, written, shown and checked (kvshare/contract.py)."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from prefillshare.arguments import BaseFolder, ChatTemplate, DecoderFolder, checked, group
from prefillshare.kvshare import chat_template as chat_templates
from prefillshare.kvshare import contract, given_files
from prefillshare.kvshare.errors import ConfigError

app = group(
    "KV contracts: the `kv_contract.json` beside a decoder's weights says which base it was trained against. "
    "A decoder is only served with that base."
)


@app.command("write")
def contract_write(
    decoder: DecoderFolder,
    base: BaseFolder,
    chat_template: ChatTemplate = None,
    trained_with: Annotated[
        str | None,
        typer.Option(help="Note for people: how the decoder was made.", show_default="vouched for by hand, or what is there"),
    ] = None,
    own_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many of a prompt's last tokens the decoder was trained to compute itself.",
            show_default="1, or what is there",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a contract that names another base.")] = False,
) -> None:
    """Vouch that DECODER was trained against the base: write its `kv_contract.json`.

    The weights do not show whether this is true; a decoder that was trained against another base gives wrong answers. If there
    is a contract that differs in the chat template only, that template is added to it: the decoder may be served under both.
    """
    given_files.writable(decoder / contract.FILE, "DECODER")
    wanted, there = _of_base(base, chat_template, trained_with or "vouched for by hand"), None
    if (decoder / contract.FILE).exists():
        with suppress(ConfigError) if force else nullcontext():
            there = contract.DecoderContract.read(decoder)
    if there and not force:
        wanted = there.with_template(wanted, str(decoder))
        wanted = replace(wanted, trained_with=trained_with or wanted.trained_with)
    # The base may be another one, but what the weights were trained for stays.
    wanted = replace(wanted, own_tokens=own_tokens or (there.own_tokens if there else 1))
    if (decoder / "config.json").is_file() and (shape := contract.KVShape.of(decoder)) != wanted.shape:
        raise ConfigError(
            f"{decoder} has KV of {shape}, but {base} has {wanted.shape}", field="--base", fix="give the base it was trained on"
        )
    typer.echo(f"wrote {wanted.write(decoder)}")


@app.command("show")
def contract_show(
    folder: Annotated[
        Path, typer.Argument(help="A decoder's folder, or a base model's.", callback=checked(given_files.folder))
    ],
    chat_template: ChatTemplate = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a decoder's contract; for a base model, the contract its decoders must have."""
    found = _contract_of(folder, chat_template)
    if as_json:
        typer.echo(json.dumps({"version": contract.VERSION, **asdict(found)}, indent=2))
        return
    for part in ("base", "shape"):
        for key, value in asdict(getattr(found, part)).items():
            typer.echo(f"{f'{part}.{key}':<19} {value}")
    for template in found.other_templates:
        typer.echo(f"{'or chat_template':<19} {template}")
    typer.echo(f"{'own_tokens':<19} {found.own_tokens}")
    typer.echo(f"{'trained_with':<19} {found.trained_with or '-'}")


@app.command("check")
def contract_check(decoder: DecoderFolder, base: BaseFolder, chat_template: ChatTemplate = None) -> None:
    """Check that DECODER may be served with the base; otherwise name what differs, both values, and exit with 2."""
    contract.DecoderContract.read(decoder).check(_of_base(base, chat_template), str(decoder))
    typer.echo(f"{decoder} was trained against the base in {base}")


def _contract_of(folder: Path, template: str | None) -> contract.DecoderContract:
    if not (folder / contract.FILE).exists() and (folder / "config.json").is_file():
        return _of_base(folder, template)
    return contract.DecoderContract.read(folder)


def _of_base(base: Path, template: str | None, trained_with: str = "") -> contract.DecoderContract:
    text = chat_templates.text_of_given(template, "--chat-template")
    return contract.DecoderContract.of_base(base, trained_with, text)
