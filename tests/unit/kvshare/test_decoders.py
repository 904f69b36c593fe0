"""Which names a deployment serves, and which decoders' files are refused before an engine starts."""

import json
import re
import shutil

import pytest

from prefillshare.kvshare import config, decoders
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import ConfigError, ContractMismatch, InvalidInput

#: One sequence of 1024 tokens in blocks of 32, plus one block, at 256 bytes a token: 33 * 32 * 256 bytes.
NEED_GIB = 33 * 32 * 256 / 2**30


@pytest.fixture
def base(model):
    return model()


@pytest.fixture
def deploy(base):
    """deploy(*pools, base=changes, **sections) -> a checked tree."""

    def make(*pools, base_changes=None, **sections):
        settings = {"model": str(base), "dtype": "float32", "max_model_len": 1024} | (base_changes or {})
        return config.parse({"base": settings, "decode": list(pools), **sections})

    return make


def adapters(*folders, **pool):
    return {"pool": "agents", "adapters": {folder.name: str(folder) for folder in folders}} | pool


def full(folder, base=None, **pool):
    if base:
        decoders.DecoderContract.of_base(base).write(folder)
    return {"pool": folder.name, "model": str(folder)} | pool


def refusal(deployment) -> ConfigError | ContractMismatch:
    with pytest.raises((ConfigError, ContractMismatch)) as caught:
        decoders.check_files(deployment)
    return caught.value


def test_decoders_made_for_the_base_are_served(deploy, adapter, model, base):
    coder = model("coder", tensors={"w": b"2"})
    pools = [adapters(adapter("planner", base=base), adapter("tools", base=base)), full(coder, base)]
    own = decoders.check_files(deploy(*pools))
    assert own == decoders.DecoderContract.of_base(base)


def test_served_names_are_the_base_and_every_decoder(deploy, adapter, model, base):
    pools = [
        full(model("coder"), name="code"),
        full(model("reviewer")),
        adapters(adapter("planner"), adapter("tools")),
        adapters(adapter("math"), pool="baseline", sharing="none"),
    ]
    served = decoders.served(deploy(*pools))
    assert list(served) == ["base", "code", "reviewer", "planner", "tools", "math"]
    assert served["base"] == decoders.Decoder("base", "agents", "prefillshare", None, "base", local_prefill="auto")
    assert served["code"] == decoders.Decoder("code", "coder", "prefillshare", None, "full")
    assert served["tools"] == decoders.Decoder("tools", "agents", "prefillshare", "tools", "lora", local_prefill="auto")
    assert served["math"] == decoders.Decoder("math", "baseline", "none", "math", "lora")


def test_adapters_that_engines_could_not_load_are_not_served(deploy, adapter):
    deployment = deploy(adapters(adapter("planner"), adapter("tools")))
    assert list(decoders.served(deployment, but={"tools": "why"})) == ["base", "planner"]


def test_base_is_served_under_its_configured_name_or_not_at_all(deploy, adapter):
    planner = adapter("planner")
    assert list(decoders.served(deploy(adapters(planner), base_changes={"name": "smol"}))) == ["smol", "planner"]
    assert list(decoders.served(deploy(adapters(planner, serve_base=False)))) == ["planner"]


def test_deployment_of_full_weights_only_serves_no_base(deploy, model):
    assert list(decoders.served(deploy(full(model("coder"))))) == ["coder"]


def test_adapter_of_another_base_is_refused_with_both_fingerprints(deploy, adapter, model, base):
    other = model("other", tensors={"w": b"other"})
    error = refusal(deploy(adapters(adapter("planner", base=other))))
    assert isinstance(error, ContractMismatch)
    assert error.field == "decode.0.adapters.planner"
    for folder in (other, base):
        assert decoders.fingerprint.weights(folder) in error.message


def test_mode_without_shared_prefill_asks_for_no_contract(deploy, adapter, model):
    decoders.check_files(deploy(adapters(adapter("planner"), sharing="none"), full(model("coder"), sharing="none")))


def test_rank_over_the_pools_limit_is_refused_with_the_limit_that_would_do(deploy, adapter, base):
    error = refusal(deploy(adapters(adapter("planner", base=base, r=24))))
    assert error.field == "decode.0.adapters.planner"
    assert re.search(r"planner has rank 24, pool 'agents' makes room for 16$", error.message)
    assert error.fix == "set max_lora_rank of the pool to 32"
    decoders.check_files(deploy(adapters(adapter("again", base=base, r=24), max_lora_rank=32)))


def test_rank_of_a_single_module_counts(deploy, adapter, base):
    error = refusal(deploy(adapters(adapter("planner", base=base, r=8, rank_pattern={"q_proj": 300}))))
    assert "has rank 300" in error.message
    assert error.fix == "train it with a lower rank"


@pytest.mark.parametrize("rank", [None, 0, "8"])
def test_adapter_without_a_rank_is_refused(deploy, adapter, base, rank):
    assert f"has rank r = {rank!r}" in refusal(deploy(adapters(adapter("planner", base=base, r=rank)))).message


def test_adapter_of_another_kind_is_refused(deploy, adapter, base):
    error = refusal(deploy(adapters(adapter("planner", base=base, peft_type="IA3"))))
    assert error.message.endswith("planner is a IA3 adapter; only LORA is served")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "kv_contract.json"])
def test_missing_file_of_an_adapter_is_named(deploy, adapter, base, file):
    folder = adapter("planner", base=base)
    (folder / file).unlink()
    error = refusal(deploy(adapters(folder)))
    assert error.field == "decode.0.adapters.planner"
    assert error.message.startswith(f"{folder} has no {file}")
    assert error.fix


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "kv_contract.json"])
def test_missing_file_of_a_full_decoder_is_named(deploy, model, base, file):
    folder = model("coder")
    pool = full(folder, base)
    (folder / file).unlink()
    error = refusal(deploy(pool))
    assert error.field == "decode.0.model"
    assert str(folder) in error.message
    assert file.removeprefix("model") in error.message
    assert error.fix


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_missing_file_of_the_base_is_named(deploy, adapter, model, base, file):
    deployment = deploy(adapters(adapter("planner", base=base)))
    (base / "chat_template.jinja").unlink()
    (base / file).unlink()
    error = refusal(deployment)
    assert error.field == "base.model"
    assert file.removeprefix("model") in error.message


@pytest.mark.parametrize("left_bytes", [4, 40, -1])
def test_truncated_adapter_is_refused(deploy, adapter, base, left_bytes):
    folder = adapter("planner", base=base)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:left_bytes])
    error = refusal(deploy(adapters(folder)))
    assert error.field == "decode.0.adapters.planner"
    assert str(file) in error.message


def test_truncated_full_decoder_is_refused(deploy, model, base):
    folder = model("coder")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    error = refusal(deploy(full(folder, base)))
    assert error.field == "decode.0.model"
    assert error.message == f"{file} is cut short: tensor model.norm.weight is incomplete"


@pytest.mark.parametrize("where", ["prefill", "decode.0", "decode.1.prefill"])
def test_kv_cache_too_small_for_one_sequence_names_a_minimum_that_works(deploy, adapter, base, where):
    def deployment(gib: float):
        shared = adapters(adapter(f"planner{gib}", base=base))
        own = adapters(adapter(f"math{gib}"), pool="baseline", sharing="none", prefill={})
        engines = {"prefill": {}, "decode.0": shared, "decode.1.prefill": own["prefill"]}
        engines[where]["kv_cache_gib"] = gib
        return deploy(shared, own, prefill=engines["prefill"])

    error = refusal(deployment(0.0001))
    assert error.field == f"{where}.kv_cache_gib"
    assert error.message == "0.0001 GiB do not hold one sequence of 1024 tokens"
    least = float(re.match(r"use at least (\S+), or lower base.max_model_len$", error.fix)[1])
    assert NEED_GIB <= least < NEED_GIB + 1e-4
    decoders.check_files(deployment(least))


def test_kv_cache_of_several_gpus_counts_together(deploy, adapter, base):
    half = NEED_GIB / 2 + 1e-6
    refusal(deploy(adapters(adapter("one", base=base), kv_cache_gib=half)))
    decoders.check_files(deploy(adapters(adapter("two", base=base), kv_cache_gib=half, tensor_parallel_size=2)))


def test_unshared_prefill_pool_is_not_measured(deploy, adapter):
    decoders.check_files(deploy(adapters(adapter("math"), sharing="none"), prefill={"kv_cache_gib": 1e-6}))


def test_length_over_the_bases_positions_is_refused(deploy, adapter, base):
    error = refusal(deploy(adapters(adapter("planner", base=base)), base_changes={"max_model_len": 4097}))
    assert error.field == "base.max_model_len"
    assert error.message == f"4097 is more than the 4096 positions of {base}"
    assert error.fix == "use at most 4096"


def test_length_over_a_decoders_positions_is_refused(deploy, model):
    short = model("coder", max_position_embeddings=512)
    error = refusal(deploy(full(short, sharing="none")))
    assert str(error) == f"base.max_model_len: 1024 is more than the 512 positions of {short} (fix: use at most 512)"


def test_stretched_positions_count(deploy, model):
    stretched = model("coder", max_position_embeddings=512, rope_scaling={"type": "linear", "factor": 2.0})
    decoders.check_files(deploy(full(stretched, sharing="none")))


@pytest.mark.parametrize("sharing", ["prefillshare", "none"])
def test_full_decoder_with_another_tokenizer_is_refused_in_every_mode(deploy, model, base, sharing):
    folder = model("coder", words=("b", "a"))
    error = refusal(deploy(full(folder, base, sharing=sharing)))
    assert isinstance(error, ContractMismatch)
    assert error.field == "decode.0.model"
    for side in (folder, base):
        assert decoders.fingerprint.tokenizer(side) in error.message
    assert error.fix == "serve a fine-tune that kept the base's tokenizer"


def test_full_decoder_of_another_shape_is_refused_where_kv_is_shared(deploy, model, base):
    folder = model("coder", num_key_value_heads=1)
    error = refusal(deploy(full(folder, base)))
    assert isinstance(error, ContractMismatch)
    assert "kv_heads=1" in error.message
    assert "kv_heads=2" in error.message
    decoders.check_files(deploy(full(folder, sharing="none")))


def test_retagged_copy_of_the_base_is_the_same_base(deploy, adapter, model, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    settings = json.loads((copy / "config.json").read_text()) | {"transformers_version": "4.40", "_name_or_path": "x"}
    (copy / "config.json").write_text(json.dumps(settings))
    decoders.check_files(deploy(adapters(adapter("planner", base=copy))))


def test_an_adapter_that_makes_keys_or_values_is_refused_where_only_the_base_does(deploy, adapter, base):
    queries = adapter("queries", base=base, modules=("q_proj", "o_proj"))
    decoders.check_files(deploy(adapters(queries, sharing="icarus"), base_changes={}))
    error = refusal(deploy(adapters(adapter("all", base=base, modules=("q_proj", "k_proj", "v_proj")), sharing="icarus")))
    assert error.field == "decode.0.adapters.all"
    assert "k_proj, v_proj" in str(error)


def test_a_mode_that_cannot_run_the_bases_architecture_says_which_it_can(deploy, model, adapter):
    other = model("other", architectures=["MambaForCausalLM"])
    error = refusal(deploy(adapters(adapter("one", base=other), sharing="icarus"), base_changes={"model": str(other)}))
    assert error.field == "decode.0.sharing"
    assert "MambaForCausalLM" in str(error)
    assert "LlamaForCausalLM" in error.fix


def test_full_weights_are_refused_where_the_base_makes_all_kv(deploy, model):
    with pytest.raises(ConfigError, match="icarus serves adapters only"):
        deploy(full(model("coder"), sharing="icarus"))


def droidspeak(folder, group, **pool):
    return adapters(folder, sharing="droidspeak", own_layers={folder.name: group}, **pool)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("1-2", r"decode\.0\.own_layers\.a: 1-2 ends after layer 1, the base's last"),
        ("0-1", r"decode\.0\.own_layers\.a: 0-1 are all layers: nothing of the base would be used \(fix: use sharing: none\)"),
    ],
)
def test_a_group_that_the_base_does_not_have_is_refused(deploy, adapter, base, group, message):
    with pytest.raises(ConfigError, match=message):
        decoders.check_files(deploy(droidspeak(adapter("a", base=base), group)))


def test_hidden_states_are_handed_over_between_engines_of_one_size(deploy, adapter, base):
    pool = droidspeak(adapter("a", base=base), "1-1", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"decode\.0\.tensor_parallel_size"):
        decoders.check_files(deploy(pool))
    decoders.check_files(deploy(pool, prefill={"tensor_parallel_size": 2}))
    decoders.check_files(deploy(pool | {"own_layers": {"a": "0-0"}}))


GRAPHS = {"engine_args": {"compilation_config": {"cudagraph_mode": "FULL"}}}


@pytest.mark.parametrize("mode", ["icarus", "droidspeak"])
def test_the_graphs_of_our_models_are_not_the_operators_to_choose(deploy, adapter, base, mode):
    error = refusal(deploy(adapters(adapter("one", base=base, modules=("q_proj",)), sharing=mode, **GRAPHS)))
    assert error.field == "decode.0.engine_args.compilation_config"


def test_nor_those_of_a_prefill_pool_that_keeps_hidden_states(deploy, adapter, base):
    folder = adapter("a", base=base)
    decoders.check_files(deploy(droidspeak(folder, "0-0"), prefill=GRAPHS))
    assert refusal(deploy(droidspeak(folder, "1-1"), prefill=GRAPHS)).field == "prefill.engine_args.compilation_config"


def test_a_cache_must_hold_the_hidden_states_too(deploy, adapter, base):
    """What enters one of the two layers takes half as much as the KV of both."""
    folder = adapter("a", base=base)
    decoders.check_files(deploy(droidspeak(folder, "0-0", kv_cache_gib=NEED_GIB), prefill={"kv_cache_gib": NEED_GIB}))
    pool = droidspeak(folder, "1-1", kv_cache_gib=1.5 * NEED_GIB)
    with pytest.raises(ConfigError, match=r"prefill\.kv_cache_gib"):
        decoders.check_files(deploy(pool, prefill={"kv_cache_gib": NEED_GIB}))
    decoders.check_files(deploy(pool, prefill={"kv_cache_gib": 1.5 * NEED_GIB}))


def test_the_prefill_pool_keeps_what_all_decoders_need(deploy, adapter, base):
    pools = [droidspeak(adapter(name, base=base), group, pool=name) for name, group in (("a", ["1-1", "none"]), ("b", "0-0"))]
    tree = deploy(*pools)
    assert [decoders.ecache_layers([pool]) for pool in tree.decode] == [(1,), ()]
    assert decoders.ecache_layers(tree.decode) == (1,)
    served = decoders.served(tree)
    assert [str(group) for group in served["a"].own_layers] == ["1-1", "None"]
    assert served["base"].own_layers == (None,)


def test_how_many_tokens_a_decoder_computes_itself_is_what_its_contract_says(deploy, adapter, base):
    plain, own = adapter("plain", base=base), adapter("own", base=base)
    DecoderContract.of_base(base, own_tokens=40).write(own)
    served = decoders.served(deploy({"pool": "agents", "adapters": {"plain": str(plain), "own": str(own)}}))
    assert {name: decoder.own_tokens for name, decoder in served.items()} == {"base": 1, "plain": 1, "own": 40}
    decoders.check_files(deploy(adapters(own)))
    decoders.check_files(deploy(adapters(own, own_tokens={"own": 40})))


@pytest.mark.parametrize(
    ("trained_with", "pool", "message"),
    [
        (40, {"own_tokens": {"own": 8}}, "own was trained to compute the last 40 tokens .* not 8.*leave own_tokens"),
        (1, {"own_tokens": {"own": 8}}, "the last 1 tokens of a prompt itself, not 8"),
        (40, {"sharing": "droidspeak"}, "not 1.*mode prefillshare"),
    ],
)
def test_a_decoder_is_not_served_with_another_boundary(deploy, adapter, base, trained_with, pool, message):
    own = adapter("own", base=base)
    DecoderContract.of_base(base, own_tokens=trained_with).write(own)
    with pytest.raises(ContractMismatch, match=message) as refused:
        decoders.check_files(deploy(adapters(own, **pool)))
    assert refused.value.field == "decode.0.adapters.own"


def test_modes_with_a_fixed_boundary_take_no_own_tokens(deploy, adapter, base):
    with pytest.raises(ConfigError, match="`own_tokens`: mode droidspeak has a fixed boundary"):
        deploy(adapters(adapter("own", base=base), sharing="droidspeak", own_tokens={"own": 8}))


def test_decoders_tell_log_probabilities_of_as_many_tokens_as_their_pools_engines_are_told(deploy, adapter, model):
    pools = [
        adapters(adapter("planner"), engine_args={"max_logprobs": 5}),
        full(model("coder"), engine_args={"max_logprobs": decoders.ALL}),
        adapters(adapter("math"), pool="baseline", sharing="none"),
    ]
    served = decoders.served(deploy(*pools))
    assert {name: d.max_logprobs for name, d in served.items()} == {"base": 5, "planner": 5, "coder": decoders.ALL, "math": 20}
    for name, asked in (("planner", 5), ("planner", 0), ("planner", None), ("coder", 1000), ("coder", decoders.ALL)):
        served[name].check_logprobs(asked)
    for name, asked, told in (("planner", 6, "6 is more than the 5"), ("math", decoders.ALL, "the whole vocabulary is more")):
        with pytest.raises(InvalidInput, match=told) as caught:
            served[name].check_logprobs(asked)
        assert caught.value.field == "logprobs"
