import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import ConfigError
from prefillshare.seeded_adapters import make_seeded_adapters


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama of two layers, with tokenizer files that are only there to be hashed."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def _logits(base, adapter=None):
    model = LlamaForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def test_each_adapter_changes_the_output_in_its_own_way(base, tmp_path):
    folders = make_seeded_adapters(base, tmp_path)
    outputs = [_logits(base), *(_logits(base, folder) for folder in folders.values())]
    assert list(folders) == ["planner", "coder", "tools"]
    for i, a in enumerate(outputs):
        for b in outputs[i + 1 :]:
            assert (a - b).abs().max() > 0.01


def test_peft_loads_every_tensor_on_all_seven_linear_layers_of_each_block(base, tmp_path):
    folder = make_seeded_adapters(base, tmp_path, names=("coder",), rank=4)["coder"]
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder)
    loaded = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert len(loaded) == 2 * 7 * 2
    assert all(4 in value.shape and 0.03 < value.std() < 0.06 for value in loaded.values())
    assert "lm_head" not in json.loads((folder / "adapter_config.json").read_text())["target_modules"]


def test_another_process_makes_the_same_bytes(base, tmp_path):
    here = make_seeded_adapters(base, tmp_path / "here", names=("coder",))["coder"]
    code = "import sys; from prefillshare.seeded_adapters import make_seeded_adapters as make; make(*sys.argv[1:], ('coder',))"
    subprocess.run([sys.executable, "-W", "error", "-c", code, base, tmp_path / "there"], check=True)
    for name in ("adapter_model.safetensors", "adapter_config.json", "kv_contract.json"):
        assert (here / name).read_bytes() == (tmp_path / "there/coder" / name).read_bytes()


def test_second_run_leaves_right_files_alone_and_repairs_damaged_ones(base, tmp_path):
    folder = make_seeded_adapters(base, tmp_path, names=("coder",))["coder"]
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    make_seeded_adapters(base, tmp_path, names=("coder",))
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before

    for name in before:
        (folder / name).write_bytes(b"{}")
    make_seeded_adapters(base, tmp_path, names=("coder",))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: data for name, (_, data) in before.items()}


def test_contract_names_the_base_and_says_that_nothing_was_trained(base, tmp_path):
    contract = DecoderContract.read(make_seeded_adapters(base, tmp_path, names=("coder",))["coder"])
    contract.check(DecoderContract.of_base(base), "coder")
    assert contract.trained_with == "not trained: seeded adapter 'coder', rank 8"


def test_base_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no linear layers in \*\.safetensors"):
        make_seeded_adapters(tmp_path, tmp_path / "out")
