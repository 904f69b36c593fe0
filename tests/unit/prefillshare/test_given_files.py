"""No command begins work before it has the files that it needs: whatever is wrong with one is one message, at once, with the
argument's name; no hub is asked, and nothing heavy is loaded first."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import typer
from model_folders import WEIGHTS
from typer.testing import CliRunner

from prefillshare.cli import app
from prefillshare.finetuning import cli as finetuning_cli
from prefillshare.kvshare import given_files
from prefillshare.kvshare.errors import ConfigError, ContractMismatch


@pytest.fixture
def there(model, adapter, tmp_path, monkeypatch):
    """A folder with what commands need, in the current folder."""
    monkeypatch.chdir(tmp_path)
    base = model("base")
    adapter("planner", base=base)
    model("other", tensors={"w": b"other"})
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "recipe.yaml").write_text(json.dumps({"base": "base", "train": "data.jsonl", "output": "out"}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    return tmp_path


#: Command, with {} in place of one of its paths -> the name of that path, and what it is.
COMMANDS = {
    "serve {}": ("FILE", "file"),
    "apply {}": ("FILE", "file"),
    "check {}": ("FILE", "file"),
    "doctor {}": ("FILE", "file"),
    "demo --config {}": ("--config", "file"),
    "demo --config data.jsonl --ca-file {}": ("--ca-file", "file"),
    "model fetch smollm2-135m-instruct --target {}": ("--target", "made folder"),
    "contract write {} --base base": ("DECODER", "weights"),
    "contract write planner --base {}": ("--base", "model"),
    "contract check {} --base base": ("DECODER", "weights"),
    "contract check planner --base {}": ("--base", "model"),
    "contract show {}": ("FOLDER", "folder"),
    "train {}": ("RECIPE", "file"),
    "train recipe.yaml --output {}": ("--output", "made folder"),
    "data arithmetic --output {}": ("--output", "written file"),
    "eval arithmetic --base {}": ("--base", "model"),
    "eval arithmetic --base base --decoder {}": ("--decoder", "weights"),
    "eval arithmetic --base base --answers {}": ("--answers", "written file"),
    "profile {} --data data.jsonl --base base": ("DECODER", "weights"),
    "profile planner --data {} --base base": ("--data", "lines"),
    "profile planner --data data.jsonl --base {}": ("--base", "model"),
    "prove --base {}": ("--base", "model"),
    "prove --shape {}": ("--shape", "file"),
    "prove --output {}": ("--output", "written file"),
}
#: What it is -> paths that are wrong, and what is said of them.
WRONG = {
    "file": {"nowhere": "nowhere is not there", "empty": "empty is a folder, not a file"},
    "lines": {"nowhere": "nowhere is not there", "empty": "empty is a folder, not a file", "empty.jsonl": "is empty",
              "binary": "is not UTF-8"},
    "folder": {"nowhere": "nowhere is not there", "data.jsonl": "data.jsonl is a file, not a folder"},
    "model": {"nowhere": "nowhere is not there", "data.jsonl": "data.jsonl is a file, not a folder",
              "empty": "empty has no config.json"},
    "weights": {"nowhere": "nowhere is not there", "data.jsonl": "data.jsonl is a file, not a folder",
                "empty": "empty has neither adapter_config.json nor config.json"},
    "made folder": {"data.jsonl": "data.jsonl is a file", "data.jsonl/x/y": "cannot write to"},
    "written file": {"empty": "empty is a folder", "data.jsonl/x/y": "cannot write to"},
}  # fmt: skip
CASES = [
    pytest.param(command.format(path), name, said, id=command.format(path))
    for command, (name, kind) in COMMANDS.items()
    for path, said in WRONG[kind].items()
]


@pytest.fixture
def no_work(monkeypatch):
    """Nothing is loaded or asked for."""

    def refuse(*args, **kw):
        pytest.fail(f"work has begun: {args}, {kw}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


@pytest.mark.usefixtures("there", "no_work")
@pytest.mark.parametrize(("command", "name", "said"), CASES)
def test_what_is_wrong_with_a_path_is_one_message(command, name, said):
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {name}: ")
    assert said in line
    assert " (fix: " in line


def commands(of: typer.Typer, name: str = ""):
    """(name, function) of all commands."""
    for one in of.registered_commands:
        yield f"{name} {one.name or one.callback.__name__}".strip(), one.callback
    for group in of.registered_groups:
        yield from commands(group.typer_instance, f"{name} {group.name}".strip())


#: Checked by the command itself: it is not needed in every case.
BY_ITSELF = {("eval", "base")}


def test_every_path_that_a_command_takes_is_looked_at_while_the_command_line_is_read():
    unchecked, found = set(), 0
    for name, function in commands(app):
        for argument, hint in typing.get_type_hints(function, include_extras=True).items():
            kind, *about = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
            if Path in (kind, *typing.get_args(kind)):
                found += 1
                unchecked |= {(name, argument) for info in about if info.callback is None}
    assert unchecked == BY_ITSELF
    assert found == len(COMMANDS)


@pytest.mark.slow
def test_a_missing_base_is_told_before_anything_heavy_is_loaded(there):
    """Which took 109 s in `profile`, and asked a hub."""
    program = (
        "import sys; from prefillshare.cli import app\n"
        "try:\n app(['profile', 'planner', '--data', 'data.jsonl', '--base', 'nowhere'])\n"
        "except SystemExit as end:\n print(end.code, *sorted({'torch', 'transformers', 'ray', 'vllm'} & sys.modules.keys()))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=there)
    assert time.monotonic() - began < 15
    assert done.stdout == "2\n"
    assert done.stderr == "error: --base: nowhere is not there (fix: give the folder of a model in Hugging Face format)\n"


@pytest.mark.usefixtures("there")
def test_a_served_address_where_nothing_answers_is_told_within_seconds(monkeypatch):
    monkeypatch.setattr(finetuning_cli, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for one in (silent, closed):
            address = f"127.0.0.1:{one.getsockname()[1]}"
            result = CliRunner().invoke(app, ["eval", "arithmetic", "--served", address, "--name", "a"])
            assert result.exit_code == 2
            assert result.stderr.startswith(f"error: --served: no deployment answers at {address}: ")
            assert result.stderr.endswith("(fix: give HOST:PORT of its gRPC surface)\n")


def test_no_hub_is_asked_by_any_command(monkeypatch):
    from prefillshare import cli

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(cli, "app", lambda: None)
    cli.main()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


BROKEN_MODELS = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config.json is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot read"),
    "config.json is another's": (
        lambda folder: (folder / "config.json").write_text("{}"),
        "lacks 'num_hidden_layers', 'num_attention_heads', 'hidden_size', 'vocab_size'; only decoder-only transformers",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no *.safetensors file"),
    "weights cut short": (lambda folder: os.truncate(folder / "model.safetensors", 40), "is not a safetensors file"),
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "tokenizer.json is not JSON": (lambda folder: (folder / "tokenizer.json").write_text("x"), "cannot read"),
    "no chat template": (
        lambda folder: [(folder / name).unlink() for name in ("chat_template.jinja", "tokenizer_config.json")],
        "has no tokenizer_config.json",
    ),
}


@pytest.mark.parametrize("wrong", BROKEN_MODELS)
def test_a_model_that_lacks_something_is_refused_by_what_it_lacks(model, wrong):
    folder = model("base")
    given_files.model(folder, "base")
    make, said = BROKEN_MODELS[wrong]
    make(folder)
    with pytest.raises(ConfigError) as refused:
        given_files.model(folder, "base")
    assert refused.value.field == "base"
    assert said in refused.value.message


BROKEN_ADAPTERS = {
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "weights cut short": (lambda folder: os.truncate(folder / "adapter_model.safetensors", 40), "is not a safetensors file"),
    "settings are not JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot read"),
    "no contract": (lambda folder: (folder / "kv_contract.json").unlink(), "has no kv_contract.json"),
    "another kind": (
        lambda folder: (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "use_dora": True})),
        "use_dora",
    ),
}


@pytest.mark.parametrize("wrong", BROKEN_ADAPTERS)
def test_a_decoder_that_lacks_something_is_refused_by_what_it_lacks(model, adapter, wrong):
    base = model("base")
    folder = adapter("planner", base=base)
    given_files.decoder(folder, base, "DECODER")
    make, said = BROKEN_ADAPTERS[wrong]
    make(folder)
    with pytest.raises(ConfigError) as refused:
        given_files.decoder(folder, base, "DECODER")
    assert refused.value.field == "DECODER"
    assert said in refused.value.message


def test_a_decoder_of_another_base_is_refused(model, adapter):
    base, other = model("base"), model("other", tensors=WEIGHTS | {"model.norm.weight": b"other"})
    with pytest.raises(ContractMismatch):
        given_files.decoder(adapter("planner", base=base), other, "DECODER")


def test_what_is_written_is_tried_before_and_leaves_nothing(tmp_path):
    given_files.writable(tmp_path / "a/b/answers.jsonl", "--answers")
    given_files.made_folder(tmp_path / "c/decoder", "--output")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c"]


def test_a_disk_that_takes_nothing_is_told(tmp_path, monkeypatch):
    def full(**kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(given_files.tempfile, "TemporaryFile", full)
    with pytest.raises(ConfigError, match=f"--answers: cannot write to {tmp_path}: No space left on device"):
        given_files.writable(tmp_path / "answers.jsonl", "--answers")


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"base": "nowhere"}, "base", "nowhere is not there"),
        ({"base": "empty"}, "base", "has no config.json"),
        ({"train": "nowhere.jsonl"}, "train", "nowhere.jsonl is not there"),
        ({"train": "empty.jsonl"}, "train", "is empty"),
        ({"validation": "nowhere.jsonl"}, "validation", "nowhere.jsonl is not there"),
        ({"output": "data.jsonl"}, "output", "data.jsonl is a file"),
        ({"output": "data.jsonl/x/y"}, "output", "cannot write to"),
        ({"lora": {"last_layers": 9}}, "lora.last_layers", "9 layers, the model has 2"),
        ({"device": "cuda"}, "device", "no device 'cuda' here"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_what_a_recipe_names_is_looked_at_before_training_begins(there, monkeypatch, change, field, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plain = json.loads((there / "recipe.yaml").read_text()) | change
    (there / "recipe.yaml").write_text(json.dumps(plain))
    result = CliRunner().invoke(app, ["train", "recipe.yaml"])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {field}: ")
    assert said in result.stderr


def test_the_folders_of_these_tests_are_fine(there):
    shutil.rmtree(there / "empty")
    for name in ("base", "other"):
        given_files.model(Path(name), "--base")
    given_files.decoder(Path("planner"), Path("base"), "DECODER")
    given_files.lines(Path("data.jsonl"), "--data")
