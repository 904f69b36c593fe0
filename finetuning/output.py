"""The folder of what was trained: weights or a PEFT adapter, the KV contract, a model card. A new base has a contract, too: it
is a fine-tune of the base that it came from."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from prefillshare.finetuning.checkpoint import FILE as CHECKPOINT_FILE
from prefillshare.finetuning.recipe import FILE as RECIPE_FILE
from prefillshare.finetuning.recipe import MAY_CHANGE, Recipe, is_whole, load
from prefillshare.finetuning.transcripts import Example
from prefillshare.kvshare.contract import FILE as CONTRACT_FILE
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import ConfigError

PACKAGES = ("torch", "transformers", "peft")
#: What a run keeps in its folder until it is done.
KV_FOLDER = "base-kv"
LOCK = "run.lock"
FIGURES = "figures.json"
#: In a new base's folder: the adapter that was merged.
MERGED = "adapter"
#: A whole model gets the base's files, byte for byte: the server compares their hashes.
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
                    "generation_config.json")  # fmt: skip


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder, and remove files that an ended run has left half written. Raises ConfigError if the
    folder holds a decoder, or another run writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run writes {folder}", field="output", fix="choose another folder") from None
        try:
            for part in (*folder.glob("*.part"), *(folder / KV_FOLDER).rglob("*.part")):
                part.unlink()
            if is_whole(folder):
                _clean_up(folder)
                raise ConfigError(f"{folder} holds a decoder already", field="output", fix="choose another, or remove it")
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def check_made_by(recipe: Recipe) -> None:
    """Raises ConfigError if what is in the output folder was made by another recipe, or from other data or another base."""
    folder = Path(recipe.output)
    if _learning(load(folder / RECIPE_FILE)) != _learning(recipe) or DecoderContract.read(folder) != contract(recipe):
        what = f"{folder} was made by another recipe, from other data or another base"
        raise ConfigError(what, field="output", fix="remove it to train it again, or choose another")


def _learning(recipe: Recipe) -> dict:
    """What decides on what is learnt."""
    return recipe.model_dump(mode="json", exclude=MAY_CHANGE)


def contract(recipe: Recipe) -> DecoderContract:
    made = f"{recipe.method}, {recipe.weights}" + (f" of rank {recipe.lora.rank}" if recipe.weights == "lora" else "")
    made = f"{made}, on {_digest(recipe.train)}"
    return DecoderContract.of_base(recipe.base, made, recipe.template_text, recipe.own_tokens)


def write(
    folder: Path,
    recipe: Recipe,
    contract: DecoderContract,
    model,
    examples: Sequence[Example],
    figures: dict,
) -> None:
    """Write all files; the contract comes last, so that a folder that has one is complete."""
    whole = recipe.weights == "full"
    if recipe.weights == "lora":
        adapter = folder / MERGED if recipe.makes_base else folder
        model.to(getattr(torch, recipe.lora.saved_as)).save_pretrained(adapter)
        if recipe.makes_base:
            whole, model = True, merged(Path(recipe.base), adapter)
    if whole:
        write_model(folder, recipe, model)
    (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "README.md").write_text(_card(folder.name, recipe, examples, figures))
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    contract.write(folder)
    _clean_up(folder)


def write_model(folder: Path, recipe: Recipe, model) -> None:
    """A whole model with the files that belong to it, in the type of the recipe's base."""
    model.to(AutoConfig.from_pretrained(recipe.base).dtype or torch.float32).save_pretrained(folder)
    for file in {file for pattern in _TOKENIZER_FILES for file in Path(recipe.base).glob(pattern)}:
        shutil.copyfile(file, folder / file.name)
    if recipe.template_text is not None:
        (folder / "chat_template.jinja").write_text(recipe.template_text)


def merged(base: Path, adapter: Path):
    """The base with an adapter added to its weights. In float64 the sums are exact for an adapter of 16 bits, in whatever order
    they are taken: every machine gets the same weights, so that decoders which were trained over them belong to all copies."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            (name,) = layer.active_adapters
            update = layer.lora_B[name].weight.data.double() @ layer.lora_A[name].weight.data.double()
            weight = layer.get_base_layer().weight
            weight.data = (weight.data.double() + layer.scaling[name] * update).to(weight.dtype)
    return model.unload()


def _clean_up(folder: Path) -> None:
    shutil.rmtree(folder / KV_FOLDER, ignore_errors=True)
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)


def _card(name: str, recipe: Recipe, examples: Sequence[Example], figures: dict) -> str:
    tags = list(dict.fromkeys(("prefillshare", recipe.method, recipe.weights)))
    front = {"base_model": Path(recipe.base).name, "tags": tags}
    if recipe.weights == "lora" and not recipe.makes_base:
        front["library_name"] = "peft"
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    left_out = f"; {n:,} responses were too long and left out" if (n := figures["responses_left_out"]) else ""
    learnt = sum(example.response_tokens for example in examples)
    validation = "" if figures["validation_loss"] is None else f", {figures['validation_loss']:.4f} on {recipe.validation}"
    about, served = _of_base(recipe) if recipe.makes_base else _of_decoder(name, recipe)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {name}

{about}

| | |
| --- | --- |
| data | `{recipe.train}` ({_digest(recipe.train)}): {len(examples):,} transcripts, {learnt:,} response tokens{left_out} |
| training | {figures['steps']:,} steps in {recipe.epochs} epochs of batches of {recipe.batch_size}, {recipe.dtype} |
| loss | {figures['loss']:.4f} at the last step{validation} |
| made in | {figures['seconds']:,} s on {figures['device']}, {versions} |

{served}
Make it again: `prefillshare train recipe.yaml --output FOLDER`, with the recipe in this folder, which has every setting.
"""


def _of_decoder(name: str, recipe: Recipe) -> tuple[str, str]:
    about = f"""A decoder of `{Path(recipe.base).name}`, trained by method `{recipe.method}` ({recipe.weights}); served in mode
`{recipe.how.sharing}`. `{CONTRACT_FILE}` says which base it belongs to; a server refuses it with any other."""
    if recipe.own_tokens > 1:
        about += f"\nIt computes the last {recipe.own_tokens} tokens of a prompt itself."
    where = f"adapters: {{{name}: {recipe.output}}}" if recipe.weights == "lora" else f"model: {recipe.output}"
    return about, f"Serve it (deployment file): `decode: [{{pool: agents, sharing: {recipe.how.sharing}, {where}}}]`."


def _of_base(recipe: Recipe) -> tuple[str, str]:
    how = f"by an adapter (`{MERGED}/`) that is merged here" if recipe.weights == "lora" else "in all weights"
    about = f"A base for decoders to share: `{Path(recipe.base).name}`, tuned {how}."
    return about, f"Train decoders over it with `base: {recipe.output}` in their recipes, and serve it as `base.model`."


def _digest(file: str) -> str:
    try:
        return f"sha256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}"
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", field="train") from None
