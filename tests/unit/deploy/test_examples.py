"""The example deployments: each is right as it stands, for a base of the size its comments speak of."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from prefillshare.kvshare import chat_template, config, decoders, fingerprint
from prefillshare.kvshare.config.access import Auth, Tls, with_files
from prefillshare.kvshare.contract import DecoderContract, KVShape
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.layer_profile import FILE, LayerProfile, Point
from prefillshare.kvshare.modes import get_mode
from prefillshare.router import tenants

FOLDER = Path(__file__).parents[3] / "deploy" / "configs"
ADAPTERS = FOLDER.parents[1] / "adapters"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
KEYS = FOLDER.parent / "keys" / "example.yaml"

#: Shapes of the bases the examples name.
BASES = {
    "models/smollm2-135m-instruct": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "max_position_embeddings": 8192,
    },
    "models/llama-3.1-8b-instruct": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 131072,
    },
}


def profile_of(base: Path, decoder: Path) -> LayerProfile:
    """As adapters/arithmetic-last-layers has it, in short."""
    points = tuple(Point(layers, at, at, at, 1.0, 12) for layers, at in (("none", 0.04), ("26-29", 0.0)))
    return LayerProfile(fingerprint.weights(base), fingerprint.weights(decoder), "data.jsonl", 30, points, (0.0,) * 30)


@pytest.fixture
def load(model, adapter, tmp_path, monkeypatch):
    """load(file) -> the example's tree, its folders made in the current folder."""

    def make(file: Path) -> config.Deployment:
        data = yaml.safe_load(file.read_text())
        shape = BASES[data["base"]["model"]]
        base = model(data["base"]["model"], **shape)
        contract = DecoderContract.of_base(base, template=chat_template.text_of(data["base"].get("chat_template")))
        for pool in data["decode"]:
            if "model" in pool:
                contract.write(model(pool["model"], tensors={"w": b"tuned"}, **shape))
            for folder in pool.get("adapters", {}).values():
                contract.write(made := adapter(folder))
                if "quality_floor" in pool:
                    profile_of(base, made).write(made)
        monkeypatch.chdir(tmp_path)
        return config.load(file)

    return make


def test_there_is_one_example_per_scenario():
    names = {file.stem for file in EXAMPLES}
    assert names == {
        "demo", "per_model_baseline", "full_weights", "one_gpu", "one_prefill_four_decode_gpus", "icarus", "tenants",
        "droidspeak", "demo_one_engine",
    }  # fmt: skip


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_is_served_as_it_stands(load, file):
    decoders.check_files(load(file))


@pytest.mark.parametrize("file", [*EXAMPLES, KEYS], ids=lambda file: file.stem)
def test_example_says_what_it_is_for_what_it_needs_and_what_to_change(file):
    comment = "\n".join(line for line in file.read_text().split("\n\n")[0].splitlines() if line.startswith("#"))
    assert re.match(r"# [A-Z].+\.\n#\n", comment)
    assert "\n# Needs: " in comment
    assert "\n# Change: " in comment


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_names_no_folder_of_one_machine(file):
    text = file.read_text()
    assert not re.search(r"(model|planner|coder|tools|arithmetic|math): [/~]", text)


def of_file(name: str) -> dict:
    """An example without the deployment's name, which all have in common with their file."""
    plain = yaml.safe_load((FOLDER / name).read_text())
    assert plain.pop("name") == name.removesuffix(".yaml").replace("_", "-")
    return plain


@pytest.mark.parametrize("file", [file.name for file in sorted(FOLDER.glob("*.yaml"))])
def test_an_example_is_named_like_its_file(file):
    assert of_file(file)


def test_demo_and_baseline_differ_in_sharing_alone():
    demo, baseline = map(of_file, ("demo.yaml", "per_model_baseline.yaml"))
    assert demo["base"] == baseline["base"]
    assert demo["decode"][0].pop("local_prefill") == "never"  # which the baseline does not need to say
    own, shared = baseline["decode"][0].pop("prefill"), demo.pop("prefill")
    assert own == {key: value for key, value in shared.items() if key != "replicas"}
    assert [pool.pop("sharing") for pool in (demo["decode"][0], baseline["decode"][0])] == ["prefillshare", "none"]
    assert demo == baseline


def test_the_demo_in_one_engine_has_the_same_base_adapters_memory_and_cores():
    demo, one = map(of_file, ("demo.yaml", "demo_one_engine.yaml"))
    prefill, (decode,), (engine,) = demo.pop("prefill"), demo.pop("decode"), one.pop("decode")
    assert one.pop("prefill") == {"replicas": 0}
    assert one == demo
    assert engine.pop("kv_cache_gib") == prefill["kv_cache_gib"] + decode.pop("kv_cache_gib")
    assert engine.pop("cpu_cores") == f"{prefill['cpu_cores']}-{decode.pop('cpu_cores')}"
    assert decode.pop("local_prefill") == "never"
    assert engine == decode


def test_tenants_are_the_demo_behind_keys(load):
    demo, tenants_of = map(of_file, ("demo.yaml", "tenants.yaml"))
    assert tenants_of["router"].pop("auth") == {"keys_file": "../keys/example.yaml"}
    assert demo["decode"][0].pop("local_prefill") == "never"  # to show prefill and decode apart
    assert tenants_of == demo
    known = tenants.load(load(FOLDER / "tenants.yaml").router.auth)
    assert list(known.by_name) == ["research", "support", "nightly"]


def test_example_keys_file_lets_nobody_in():
    """Its digests are not of keys: nobody can have the key to sixty-four times the same digit."""
    known = tenants.load(Auth(keys_file=str(KEYS)))
    for keys in (known.operator_keys, *(tenant.keys for tenant in known.by_name.values())):
        assert keys
        assert all(len(set(key)) == 1 for key in keys)


def test_certificate_of_the_comment_is_one_that_can_be_used(tmp_path):
    comment = re.findall(r"^  # .*#  (.*)$", (FOLDER / "tenants.yaml").read_text(), re.M)
    command = " ".join(line.strip().rstrip("\\") for line in comment)
    assert command.startswith("openssl req")
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True, timeout=60)
    files = Tls(cert_file="cert.pem", key_file="key.pem")
    assert with_files(None, files, tmp_path)["tls"].cert_file == str(tmp_path / "cert.pem")


def test_demo_serves_two_adapters_and_the_base_on_two_cores(load):
    demo = load(FOLDER / "demo.yaml")
    assert list(decoders.served(demo)) == ["base", "tools", "arithmetic"]
    assert (demo.prefill.cpu_cores, demo.decode[0].cpu_cores) == ("0", "1")
    assert (demo.base.tool_call_parser, demo.base.chat_template) == ("hermes", "smollm2_tools")


def test_adapters_that_come_with_us_may_be_served_under_the_template_with_tools():
    """Whoever changes the template vouches anew, by `prefillshare contract write --chat-template smollm2_tools`."""
    wanted = fingerprint.of_text(chat_template.text_of("smollm2_tools"))
    for folder in sorted(ADAPTERS.glob("*/kv_contract.json")):
        assert DecoderContract.read(folder.parent).other_templates == (wanted,)


def test_figures_in_the_comments_are_right(load):
    demo, gpu = load(FOLDER / "demo.yaml"), load(FOLDER / "one_gpu.yaml")
    small, large = (KVShape.of(tree.base.model).bytes_per_token(tree.base.dtype) for tree in (demo, gpu))
    assert (small, large) == (45 * 1024, 128 * 1024)
    assert 11_000 < demo.prefill.kv_cache_gib * 2**30 / small < 12_000
    assert gpu.base.max_model_len * large == 2 * 2**30
    assert 32768 * large == 4 * 2**30


def test_one_gpu_is_one_engine(load):
    gpu = load(FOLDER / "one_gpu.yaml")
    assert gpu.shared_prefill is None
    assert [e.replicas * e.gpu_share for e in gpu.decode] == [1]
    assert gpu.decode[0].kv_cache_gib + 15 < 0.9 * 80e9 / 2**30


def test_the_droidspeak_adapter_has_a_profile_of_its_own_weights_and_is_exact_with_few_layers(load):
    tree = load(FOLDER / "droidspeak.yaml")
    assert decoders.served(tree)["arithmetic"].own_layers == (LayerGroup(26, 29),)
    (pool,) = yaml.safe_load((FOLDER / "droidspeak.yaml").read_text())["decode"]
    shipped = FOLDER.parents[1] / pool["adapters"]["arithmetic"]
    profile = json.loads((shipped / FILE).read_text())
    assert profile["decoder"] == fingerprint.weights(shipped)
    (point,) = [point for point in profile["points"] if point["layers"] == "26-29"]
    assert point["high"] < tree.decode[0].quality_floor


def test_eight_icarus_adapters_stand_on_two_gpus(load):
    tree = load(FOLDER / "icarus.yaml")
    assert [e.replicas * e.gpu_share for e in (tree.prefill, *tree.decode)] == [1, 1]
    assert get_mode(tree.decode[0].sharing).lends_responses
    assert len(tree.decode[0].adapters) == 8


def test_four_decode_gpus_are_five_with_prefill(load):
    tree = load(FOLDER / "one_prefill_four_decode_gpus.yaml")
    assert [e.replicas * e.gpu_share for e in (tree.prefill, *tree.decode)] == [1, 1, 1, 1, 1]
    assert (tree.base.dtype, tree.base.block_size) == ("bfloat16", 16)
