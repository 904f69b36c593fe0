"""Every tensor and every setting of an adapter has its place, or the adapter is refused with what, where and a fix."""

import json
import re
from pathlib import Path

import pytest
from model_folders import LINEAR, lora, write_safetensors
from safetensors import SafetensorError, safe_open

from prefillshare.kvshare import adapter_files, config, decoders
from prefillshare.kvshare.adapter_settings import AdapterSettings
from prefillshare.kvshare.errors import ConfigError
from prefillshare.seeded_adapters import make_seeded_adapters

ROOT = Path(__file__).parents[3]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(model):
    return model()


@pytest.fixture
def refusal(base, adapter):
    """refusal(adapter's changes) -> what `check` says of a deployment with it."""

    def make(**changes) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            served(base, adapter("bad", base=base, **changes))
        error = caught.value
        assert error.field == "decode.0.adapters.bad"
        assert str(adapter_folder(error)) in error.message
        assert error.fix
        return error

    def adapter_folder(error) -> str:
        return re.match(r"\S*/bad", error.message)[0]

    return make


def served(base: Path, folder: Path):
    pool = {"pool": "agents", "adapters": {folder.name: str(folder)}}
    settings = {"model": str(base), "dtype": "float32", "max_model_len": 1024}
    decoders.check_files(config.parse({"base": settings, "decode": [pool]}))


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "a bias of LoRA B"),
        ("bias", "all", "biases of the base are changed"),
        ("bias", "lora_only", "biases of the base are changed"),
        ("alora_invocation_tokens", [5], "activated LoRA"),
        ("layer_replication", [[0, 2]], "layers of the base run more than once"),
        ("modules_to_save", ["embed_tokens"], "modules trained in full"),
        ("trainable_token_indices", [7], "embeddings trained beside"),
        ("trainable_token_indices", {"embed_tokens": [7]}, "embeddings trained beside"),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "bare parameters"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("kasa_config", {"beta": 1e-4}, "KaSA"),
        ("monteclora_config", {"num_samples": 4}, "MonteCLoRA"),
        ("fan_in_fan_out", True, "transposed"),
        ("init_lora_weights", "pissa", "belongs to a base changed with it"),
        ("init_lora_weights", "pissa_niter_16", "belongs to a base changed with it"),
        ("init_lora_weights", "olora", "belongs to a base changed with it"),
        ("init_lora_weights", "corda", "belongs to a base changed with it"),
        ("init_lora_weights", "loftq", "belongs to a base changed with it"),
        ("task_type", "SEQ_CLS", "decoders generate text"),
        ("task_type", "TOKEN_CLS", "decoders generate text"),
        ("use_next_years_lora", True, "which this release does not know"),
        ("next_years_config", {"a": 1}, "which this release does not know"),
        ("lora_alpha", ..., "a number other than 0"),
        ("lora_alpha", None, "a number other than 0"),
        ("lora_alpha", 0, "a number other than 0"),
        ("lora_alpha", "16", "a number other than 0"),
        ("use_rslora", "yes", "true or false"),
        ("rank_pattern", {"q_proj": 0}, "patterns of module names to ranks"),
        ("rank_pattern", {"q_proj(": 8}, "patterns of module names to ranks"),
        ("rank_pattern", [8], "patterns of module names to ranks"),
        ("alpha_pattern", {"q_proj": "8"}, "patterns of module names to numbers"),
        ("target_modules", ..., "a list of module names, or a pattern"),
        ("target_modules", None, "a list of module names, or a pattern"),
        ("target_modules", [], "a list of module names, or a pattern"),
        ("target_modules", [1], "a list of module names, or a pattern"),
        ("target_modules", "q_proj(", "a list of module names, or a pattern"),
        ("exclude_modules", {"a": 1}, "a list of module names, or a pattern"),
        ("layers_to_transform", ["0"], "a list of layers"),
        ("layers_pattern", 3, "the name of the list of layers"),
    ],
)
def test_a_setting_that_no_engine_follows_is_refused_by_name(refusal, key, value, what):
    error = refusal(**{key: value})
    assert what in error.message
    assert key in error.message
    if value is not ...:
        assert repr(value) in error.message


@pytest.mark.parametrize(
    ("tensor", "shape", "what"),
    [
        (f"{Q}.lora_magnitude_vector.weight", (32,), "is DoRA's"),
        (f"{Q}.lora_B.bias", (32,), "is a bias"),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", (32,), "is a bias"),
        ("base_model.model.model.embed_tokens.weight", (64, 32), "is of the embeddings"),
        ("base_model.model.model.embed_tokens.base_layer.weight", (64, 32), "is of the embeddings"),
        ("base_model.model.model.embed_tokens.modules_to_save.weight", (64, 32), "is of the embeddings"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (8, 64), "is of the embeddings"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", (1, 32), "is of the embeddings"),
        ("base_model.model.lm_head.weight", (64, 32), "is of the embeddings or the head"),
        ("base_model.model.lm_head.base_layer.weight", (64, 32), "is of the embeddings or the head"),
        ("base_model.model.lm_head.lora_A.weight", (8, 32), "is of the embeddings or the head"),
        ("base_model.model.score.weight", (2, 32), "is of a classification head"),
        ("base_model.model.classifier.weight", (2, 32), "is of a classification head"),
        ("base_model.model.model.layers.0.input_layernorm.weight", (32,), "is no tensor that PEFT writes for LoRA"),
        (f"{Q}.weight", (32, 32), "is no tensor that PEFT writes for LoRA"),
        (f"{Q}.lora_A.default.weight", (8, 32), "has the adapter's own name in it"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (8, 32), "is no tensor that PEFT writes for LoRA"),
        ("base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight", (8, 32), "under another prefix"),
        ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", (8, 32), "under another prefix"),
        ("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", (8, 32), "does not have; its last is 1"),
        ("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight", (8, 32), "of a module that the base does not"),
        ("base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight", (8, 32), "of a module that the base does not"),
    ],
)
def test_a_tensor_that_engines_would_drop_is_refused_by_name(refusal, tensor, shape, what):
    error = refusal(tensors=lora(["self_attn.q_proj"]) | {tensor: shape})
    assert tensor in error.message
    assert what in error.message


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tensors": {}}, "holds no tensors"),
        ({"tensors": {f"{Q}.lora_A.weight": (8, 32)}}, "has lora_A and no lora_B"),
        ({"tensors": {f"{Q}.lora_B.weight": (32, 8)}}, "has lora_B and no lora_A"),
        ({"tensors": lora(["self_attn.q_proj"], 4)}, "has rank 4 (lora_A) and 4 (lora_B), adapter_config.json says 8"),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 4}}, "has rank 8 (lora_A) and 8 (lora_B), adapter_config.json says 4"),
        ({"tensors": lora(["self_attn.q_proj"]) | {f"{Q}.lora_A.weight": (8, 16)}}, "the base's has 32 and 32"),
        ({"tensors": lora(["self_attn.q_proj"]) | {f"{Q}.lora_B.weight": (16, 8)}}, "the base's has 32 and 32"),
        ({"tensors": lora(["self_attn.q_proj"]) | {f"{Q}.lora_B.weight": (32, 8, 1)}}, "both are matrices"),
        ({"tensors": lora(["self_attn.q_proj"]) | {f"{Q}.lora_B.weight": b"x" * 8}}, "has type U8"),
        ({"target_modules": ["q_proj", "v_proj"]}, "lacks model.layers.0.self_attn.v_proj"),
        ({"target_modules": ["v_proj"]}, "has model.layers.0.self_attn.q_proj, which target_modules"),
        ({"layers_to_transform": [0]}, "has model.layers.1.self_attn.q_proj, which target_modules"),
        ({"layers_to_transform": 1}, "has model.layers.0.self_attn.q_proj, which target_modules"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, "has model.layers.0.self_attn.q_proj, which target_modules"),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "has model.layers.0.self_attn.q_proj, which target_modules"),
        ({"exclude_modules": r".*\.0\..*"}, "has model.layers.0.self_attn.q_proj, which target_modules"),
        ({"target_modules": "all-linear"}, "lacks model.layers.0.self_attn.k_proj"),
        ({"target_modules": r".*\.[qk]_proj"}, "lacks model.layers.0.self_attn.k_proj"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_refused(refusal, changes, what):
    assert what in refusal(**changes).message


def test_the_first_fix_of_an_adapter_of_another_kind_can_be_followed(refusal):
    assert refusal(use_dora=True).fix == "train it as plain LoRA, or merge it into the base's weights and serve it as a `model`"


ALL = [module.rsplit(".", 1)[1] for module in LINEAR]
FIRST = {name: shape for name, shape in lora(LINEAR).items() if ".layers.0." in name}


@pytest.mark.parametrize(
    "changes",
    [
        {"modules": ALL},
        {"modules": ALL, "target_modules": "all-linear"},
        {"modules": ALL, "target_modules": r".*(self_attn|mlp)\.\w+_proj"},
        {"modules": ALL, "target_modules": [*ALL, "not_there"]},
        {"target_modules": "all-linear", "exclude_modules": [name for name in ALL if name != "q_proj"]},
        {"modules": ALL, "tensors": FIRST, "layers_to_transform": [0]},
        {"modules": ALL, "tensors": FIRST, "layers_to_transform": [0], "layers_pattern": "layers"},
        {"modules": ALL, "tensors": FIRST, "layers_to_transform": 0, "layers_pattern": ["h", "layers"]},
        {"rank_pattern": {"q_proj": 4}, "tensors": lora(["self_attn.q_proj"], 4)},
        {"rank_pattern": {r".*\.self_attn\..*": 4, "q_proj": 2}, "tensors": lora(["self_attn.q_proj"], 4)},
        {"alpha_pattern": {"q_proj": 4.5}, "use_rslora": True, "init_lora_weights": "gaussian"},
        {"init_lora_weights": False, "lora_alpha": 0.5, "task_type": "CAUSAL_LM", "bias": ...},
        {"qalora_group_size": 16, "lorap_emb_lr": 1e-6, "use_next_years_lora": False, "next_years_config": {}},
    ],
)
def test_whatever_peft_saves_for_the_bases_linear_modules_is_served(base, adapter, changes):
    served(base, adapter("good", base=base, **changes))


def test_a_base_whose_weights_are_packed_takes_adapters_by_name(model, adapter):
    packed = {name.replace(".weight", ".qweight"): (4, 4) for name in _linear_weights()}
    base = model("packed", tensors=packed)
    served(base, adapter("good", base=base))


def _linear_weights() -> list[str]:
    return [f"model.layers.{layer}.{module}.weight" for layer in range(2) for module in LINEAR]


def test_experts_that_transformers_fuses_need_no_adapter(model, adapter):
    experts = {f"model.layers.{layer}.mlp.experts.0.up_proj.weight": (48, 32) for layer in range(2)}
    base = model("experts", tensors={name: (32, 32) for name in _linear_weights() if "q_proj" in name} | experts)
    served(base, adapter("good", base=base, target_modules=["q_proj", "up_proj"]))


def test_adapters_made_here_are_served(tmp_path, model):
    base = model()
    folder = str(make_seeded_adapters(base, tmp_path / "made", names=("a",))["a"])
    assert len(adapter_files.check(folder, AdapterSettings.read(folder), adapter_files.linear_modules(base))) == 14


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda data: data + b"\0", "1 bytes behind the last tensor"),
        (lambda data: data.replace(b'"shape": [8, 32]', b'"shape": [8, 33]', 1), "of shape [8, 33] has 512 bytes"),
        (lambda data: data.replace(b"[512, 1024]", b"[510, 1022]", 1), "a gap or an overlap before tensor"),
    ],
)
def test_a_file_that_the_safetensors_library_would_not_open_is_refused(base, adapter, spoil, what):
    folder = adapter("bad", base=base)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ConfigError, match=re.escape(what)):
        served(base, folder)
    with pytest.raises(SafetensorError), safe_open(file, framework="np"):
        pass


#: SmolLM2-135M-Instruct.
SMOLLM = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(30)
    for module, shape in {
        "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(("name", "modules"), [("tools", 210), ("arithmetic", 210), ("arithmetic-last-layers", 28)])
def test_the_adapters_that_come_with_it_are_accounted_for(name, modules):
    folder = str(ROOT / "adapters" / name)
    assert len(adapter_files.check(folder, AdapterSettings.read(folder), SMOLLM)) == modules


def test_a_good_adapter_beside_tensors_of_nobody_is_not_half_served(base, adapter):
    """A copy of a good one with one tensor more."""
    folder = adapter("good", base=base)
    served(base, folder)
    write_safetensors(folder / "adapter_model.safetensors", lora(["self_attn.q_proj"]) | {"x": (1, 1)})
    with pytest.raises(ConfigError, match="x is no tensor that PEFT writes"):
        served(base, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
