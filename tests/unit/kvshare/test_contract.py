"""Fingerprints say what a model is, not how it is stored; the contract refuses what differs and names both values (R4)."""

import json
import os
import re
from dataclasses import replace

import pytest

from prefillshare.kvshare import contract, fingerprint
from prefillshare.kvshare.contract import BaseIdentity, DecoderContract, KVContract, KVShape
from prefillshare.kvshare.errors import ConfigError, ContractMismatch

YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
ONE, TWO = b"\x01" * 16, b"\x02" * 16


def edit_json(path, **changes):
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: data[key] for key in reversed(data)}))


def test_weights_have_one_fingerprint_however_they_are_sharded(model, safetensors):
    whole = model("whole", tensors={"a": ONE, "b": TWO})
    turned = model("turned", tensors={"b": TWO, "a": ONE})
    shards = model("shards")
    (shards / "model.safetensors").unlink()
    safetensors(shards / "model-00001-of-00002.safetensors", {"b": TWO})
    safetensors(shards / "model-00002-of-00002.safetensors", {"a": ONE})
    assert fingerprint.weights(whole) == fingerprint.weights(turned) == fingerprint.weights(shards)


def test_one_changed_byte_of_the_weights_changes_the_fingerprint(model, safetensors):
    folder = model(tensors={"a": ONE, "b": TWO})
    before = fingerprint.weights(folder)
    # At once, with the same size: faster than the file system's clock ticks.
    safetensors(folder / "model.safetensors", {"a": ONE, "b": TWO[:-1] + b"\x03"})
    assert fingerprint.weights(folder) != before


def test_tensors_name_and_shape_are_part_of_the_fingerprint(model):
    prints = {
        fingerprint.weights(model("plain", tensors={"a": ONE, "b": TWO})),
        fingerprint.weights(model("renamed", tensors={"a": ONE, "c": TWO})),
        fingerprint.weights(model("swapped", tensors={"a": TWO, "b": ONE})),
        fingerprint.weights(model("split otherwise", tensors={"a": ONE + TWO[:1], "b": TWO[1:]})),
    }
    assert len(prints) == 4


def test_settled_weights_are_hashed_once(model, monkeypatch):
    folder = model()
    os.utime(folder / "model.safetensors", (1_000_000, 1_000_000))
    first = fingerprint.weights(folder)
    monkeypatch.setattr(fingerprint, "safetensors_header", lambda file: pytest.fail(f"{file} was read again"))
    assert fingerprint.weights(folder) == first


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_damaged_cache_of_fingerprints_only_costs_time(model, content):
    folder = model()
    os.utime(folder / "model.safetensors", (1_000_000, 1_000_000))
    cache = fingerprint._cache_file()
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    digest = fingerprint.weights(folder)
    assert json.loads(cache.read_text()).popitem()[1] == digest


def test_only_the_files_the_index_names_are_the_model(model, safetensors):
    folder = model("plain")
    indexed = model("indexed")
    safetensors(indexed / "consolidated.safetensors", {"other.name": ONE})
    index = {"weight_map": {"model.embed_tokens.weight": "model.safetensors", "model.norm.weight": "model.safetensors"}}
    (indexed / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint.weights(indexed) == fingerprint.weights(folder)


def test_missing_shard_is_named(model):
    folder = model()
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"lacks model-2\.safetensors, which model\.safetensors\.index\.json names"):
        fingerprint.weights(folder)


def test_tensor_in_two_files_is_refused(model, safetensors):
    folder = model(tensors={"a": ONE})
    safetensors(folder / "stale.safetensors", {"a": TWO})
    with pytest.raises(ConfigError, match=r"tensor a is in both \S+/model\.safetensors and \S+/stale\.safetensors"):
        fingerprint.weights(folder)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda data: data[:-1], "is cut short: tensor b is incomplete"),
        (lambda data: data[:20], "is not a safetensors file: its header is longer than the file"),
        (lambda data: data[:4], "is not a safetensors file"),
        (lambda data: b"", "is not a safetensors file"),
        (lambda data: b"\x02" + bytes(7) + b"[]" + bytes(9), "is not a safetensors file"),
        (lambda data: data.replace(b'"data_offsets"', b'"date_offsets"'), "is not a safetensors file: 'data_offsets'"),
        (lambda data: data.replace(b"[16, 32]", b"[32, 16]"), "is not a safetensors file: tensor b has offsets 32 to 16"),
    ],
)
def test_damaged_weights_are_refused_by_file(model, damage, text):
    folder = model(tensors={"a": ONE, "b": TWO})
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))} {re.escape(text)}"):
        fingerprint.weights(folder)


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors file"):
        fingerprint.weights(tmp_path)


def test_order_of_keys_and_volatile_keys_do_not_change_the_config_fingerprint(model):
    folder = model()
    before = fingerprint.config(folder)
    edit_json(folder / "config.json", transformers_version="5.0", dtype="bfloat16", use_cache=False, _name_or_path="elsewhere")
    assert fingerprint.config(folder) == before


def test_whatever_the_model_computes_with_changes_the_config_fingerprint(model):
    folder = model()
    before = fingerprint.config(folder)
    edit_json(folder / "config.json", rms_norm_eps=1e-6)
    changed = fingerprint.config(folder)
    edit_json(folder / "config.json", rope_theta=20000.0)
    assert len({before, changed, fingerprint.config(folder)}) == 3


def test_padding_and_key_order_do_not_change_the_tokenizer_fingerprint(model):
    folder = model()
    before = fingerprint.tokenizer(folder)
    edit_json(folder / "tokenizer.json", padding={"length": 8}, truncation={"max_length": 8}, version="1.1")
    assert fingerprint.tokenizer(folder) == before


def test_other_ids_change_the_tokenizer_fingerprint(model):
    assert fingerprint.tokenizer(model("one")) != fingerprint.tokenizer(model("two", words=("b", "a")))


def test_chat_template_has_one_fingerprint_wherever_it_is_kept(model):
    apart, inside, other = model("apart"), model("inside"), model("other", template="{{ messages }} ")
    (inside / "chat_template.jinja").unlink()
    edit_json(inside / "tokenizer_config.json", chat_template="{{ messages }}")
    assert fingerprint.chat_template(apart) == fingerprint.chat_template(inside) != fingerprint.chat_template(other)


def test_model_without_chat_template_says_none(model):
    folder = model()
    (folder / "chat_template.jinja").unlink()
    assert fingerprint.chat_template(folder) == "none"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 10000}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        ({"rope_theta": ..., "rope_scaling": None}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4}},
            {"rope_parameters": YARN},
        ),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        ),
    ],
)
def test_rope_of_transformers_4_and_5_is_one_shape_and_one_fingerprint(model, old, new):
    four, five = model("four", **old), model("five", rope_theta=..., **new)
    assert KVShape.of(four) == KVShape.of(five)
    assert fingerprint.config(four) == fingerprint.config(five)


def test_other_rope_is_another_shape(model):
    assert KVShape.of(model("one")).rope != KVShape.of(model("two", rope_theta=5e5)).rope


def test_shape_is_read_from_the_config(model):
    shape = KVShape.of(model())
    assert (shape.layers, shape.kv_heads, shape.head_size, shape.vocab_size) == (2, 2, 8, 64)
    assert json.loads(shape.rope) == {"rope_theta": 10000.0, "rope_type": "default"}
    assert (shape.bytes_per_token("float32"), shape.bytes_per_token("bfloat16")) == (256, 128)


def test_shape_knows_models_without_grouped_heads_and_with_a_head_size_of_their_own(model):
    assert KVShape.of(model("ungrouped", num_key_value_heads=...)).kv_heads == 4
    assert KVShape.of(model("wide", head_dim=128)).head_size == 128


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_attention_heads": ...}, "lacks 'num_attention_heads'; only decoder-only transformers are served"),
        ({"num_attention_heads": 0}, "is not a model's"),
        ({"hidden_size": "32"}, "is not a model's"),
    ],
)
def test_config_that_is_no_decoder_only_model_is_refused(model, changes, text):
    with pytest.raises(ConfigError, match=f"config.json {text}"):
        KVShape.of(model(**changes))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(("content", "text"), [(None, "has no"), ("{", "cannot read"), ("[]", "is not a JSON object")])
def test_missing_or_garbled_model_file_is_named(model, file, content, text):
    folder = model()
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=text) as caught:
        BaseIdentity.of(folder)
    assert file in str(caught.value)


def test_kv_contract_json_comes_back_as_written(model, tmp_path):
    written = DecoderContract.of_base(model(), trained_with="2 epochs of tools")
    path = written.write(tmp_path)
    assert path == tmp_path / "kv_contract.json"
    assert json.loads(path.read_text())["version"] == contract.VERSION == 1
    assert DecoderContract.read(tmp_path) == written


def test_missing_contract_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(ConfigError) as caught:
        DecoderContract.read(tmp_path, "decode.0.model")
    assert caught.value.field == "decode.0.model"
    assert caught.value.message == f"{tmp_path} has no kv_contract.json, so nothing says which base it was trained against"
    assert f"prefillshare contract write {tmp_path} --base BASE_FOLDER" in caught.value.fix


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "cannot read"),
        ("[]", "is not a JSON object"),
        ("{}", "has version None, this release reads 1"),
        ('{"version": 2}', "has version 2, this release reads 1"),
        ('{"version": 1}', "is not a KV contract: 'base'"),
        ('{"version": 1, "base": {"weights": "x"}, "shape": {}}', "is not a KV contract"),
        ('{"version": 1, "base": 5, "shape": {}}', "is not a KV contract"),
        ('{"version": 1, "base": {}, "shape": {}, "own_tokens": 0}', "own_tokens is 0, not a number of tokens"),
        ('{"version": 1, "base": {}, "shape": {}, "own_tokens": true}', "own_tokens is True, not a number of tokens"),
        ('{"version": 1, "base": {}, "shape": {}, "own_tokens": "32"}', "own_tokens is '32', not a number of tokens"),
    ],
)
def test_garbled_contract_is_refused_with_field_and_fix(tmp_path, content, text):
    (tmp_path / contract.FILE).write_text(content)
    with pytest.raises(ConfigError, match=text) as caught:
        DecoderContract.read(tmp_path, "decode.0.model")
    assert caught.value.field == "decode.0.model"
    assert caught.value.fix == f"write it again: prefillshare contract write {tmp_path} --base BASE_FOLDER"


@pytest.mark.parametrize("key", ["weights", "config", "tokenizer", "chat_template"])
def test_another_base_is_refused_with_both_values(model, key):
    served = DecoderContract.of_base(model())
    trained = replace(served, base=replace(served.base, **{key: "0123"}))
    with pytest.raises(ContractMismatch) as caught:
        trained.check(served, "adapters/tools", "decode.0.adapters.tools")
    assert str(caught.value) == (
        f"decode.0.adapters.tools: adapters/tools was trained against a base whose {key} is 0123, "
        f"the base served has {getattr(served.base, key)} (fix: {caught.value.fix})"
    )
    vouch = "prefillshare contract write DECODER --base BASE_FOLDER --chat-template TEMPLATE"
    assert (vouch in caught.value.fix) is (key == "chat_template")
    assert ("train it against this one" in caught.value.fix) is (key != "chat_template")


def test_a_template_in_the_bases_place_is_what_the_contract_names(model):
    folder = model(template="{{ messages }}")
    own, same, other = (BaseIdentity.of(folder, template) for template in (None, "{{ messages }}", "{{ messages }}!"))
    assert own == same
    assert other == replace(own, chat_template=fingerprint.of_text("{{ messages }}!"))
    assert len({KVContract(one, KVShape.of(folder), "float32", 32, "x").digest for one in (own, same, other)}) == 2


def test_a_decoder_is_served_under_the_templates_that_somebody_vouches_for_and_no_others(model, tmp_path):
    folder = model()
    served = {text: DecoderContract.of_base(folder, template=text) for text in ("a", "b", "c")}
    trained = replace(served["a"], trained_with="hours")
    vouched = trained.with_template(served["b"], "it").with_template(served["a"], "it")
    vouched.write(tmp_path)
    vouched = DecoderContract.read(tmp_path)
    assert vouched == trained
    assert vouched.other_templates == (served["b"].base.chat_template,)
    vouched.check(served["a"], "it")
    vouched.check(served["b"], "it")
    for decoder, base in ((vouched, served["c"]), (trained, served["b"])):
        with pytest.raises(ContractMismatch, match="whose chat_template is"):
            decoder.check(base, "it")
    with pytest.raises(ContractMismatch, match="whose weights is"):
        trained.with_template(replace(served["b"], base=replace(served["b"].base, weights="0")), "it")


def test_a_contract_for_one_template_has_the_form_that_earlier_releases_read(model, tmp_path):
    DecoderContract.of_base(model()).write(tmp_path)
    assert json.loads((tmp_path / "kv_contract.json").read_text()).keys() == {"version", "base", "shape", "trained_with"}


def test_an_own_end_of_the_prompt_is_part_of_what_a_decoder_was_trained_for(model, tmp_path):
    own = DecoderContract.of_base(model(), own_tokens=32)
    own.write(tmp_path)
    assert DecoderContract.read(tmp_path) == own != replace(own, own_tokens=1)


def test_another_shape_is_refused_with_both_values(model):
    served = DecoderContract.of_base(model())
    with pytest.raises(ContractMismatch, match="whose layers is 3, the base served has 2"):
        replace(served, shape=replace(served.shape, layers=3)).check(served, "it")


def test_how_a_decoder_was_trained_is_no_part_of_the_agreement(model):
    served = DecoderContract.of_base(model())
    replace(served, trained_with="otherwise").check(served, "it")


def test_digest_changes_with_everything_that_changes_the_bytes(model):
    folder = model()
    one = KVContract(BaseIdentity.of(folder), KVShape.of(folder), "float32", 32, "vllm 0.32")
    others = [
        replace(one, dtype="bfloat16"),
        replace(one, block_size=16),
        replace(one, engine="vllm 0.33"),
        replace(one, transport="nccl"),
        replace(one, base=replace(one.base, weights="0")),
        replace(one, shape=replace(one.shape, kv_heads=1)),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 7
    assert re.fullmatch("[0-9a-f]{32}", one.digest)
    assert replace(one).digest == one.digest
