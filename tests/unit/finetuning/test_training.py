"""A training run: it learns, goes on after a kill as if nothing had been, and leaves a folder that can be served."""

import json
import shutil
from itertools import chain

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from prefillshare.finetuning import log, output, recipe, subjects, train
from prefillshare.finetuning.batches import Batches
from prefillshare.finetuning.several import check, train_all
from prefillshare.kvshare import config, decoders
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import ConfigError, ContractMismatch
from tests import letters

pytestmark = pytest.mark.slow

TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return letters.write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return letters.write_transcripts(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture
def run(base, data, tmp_path):
    def run(name="decoder", **changes):
        settings = {
            "base": str(base), "train": str(data), "output": str(tmp_path / name), "epochs": 3, "batch_size": 4,
            "micro_batch_size": 2, "learning_rate": 5e-3, "lora": {"rank": 4, "dropout": 0.1}, "checkpoint_every_steps": 5,
        }  # fmt: skip
        folder = train.train(recipe.parse(settings | changes), Console(quiet=True))
        return folder, log.read(folder)

    return run


def losses(rows):
    return [row["loss"] for row in rows]


@pytest.mark.parametrize(
    "changes",
    [{"method": "prefillshare"}, {"own_tokens": 3}, {"method": "icarus"}, {"method": "ordinary"}, {"weights": "full"},
     {"dtype": "bfloat16"}, {"method": "icarus", "dtype": "bfloat16"},
     {"weights": "full", "dtype": "bfloat16", "gradient_checkpointing": True}],
)
def test_it_learns(run, changes):
    _, rows = run(**changes)
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert sum(losses(rows)[-6:]) < sum(losses(rows)[:6])


@pytest.fixture
def ended_at(run, monkeypatch):
    """A run that somebody ends after some steps."""

    def ended_at(steps, name, **changes):
        def ending(recipe, step, of):
            if step == steps:
                raise KeyboardInterrupt
            return rate(recipe, step, of)

        rate = train.learning_rate
        monkeypatch.setattr(train, "learning_rate", ending)
        with pytest.raises(KeyboardInterrupt):
            run(name, **changes)
        monkeypatch.setattr(train, "learning_rate", rate)

    return ended_at


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_was_ended_goes_on_with_the_same_losses(run, ended_at, dtype):
    _, whole = run("whole", dtype=dtype)
    ended_at(8, "ended", dtype=dtype)
    folder, rows = run("ended", dtype=dtype)
    assert losses(rows) == losses(whole)
    assert not (folder / "checkpoint.pt").exists()


def test_a_log_is_whole_before_a_resumed_run_has_made_a_step(tmp_path):
    """A run that is killed flushes nothing."""
    row = dict.fromkeys(log.COLUMNS, 1.0)
    with log.TrainingLog(tmp_path, 0) as first:
        for step in range(1, 6):
            first.write(row | {"step": step, "epoch": 1, "tokens": 10})
    with log.TrainingLog(tmp_path, 3):
        assert [row["step"] for row in log.read(tmp_path)] == [1, 2, 3]


def test_two_runs_do_not_share_a_folder(run, tmp_path):
    with output.alone_in(tmp_path / "decoder"), pytest.raises(ConfigError, match="another run writes"):
        run()


def test_another_recipes_checkpoint_is_not_gone_on_with(run, ended_at):
    ended_at(6, "decoder")
    with pytest.raises(ConfigError, match="whose seed was 0, now it is 1"):
        run(seed=1)


@pytest.mark.parametrize("budget", [0, 1e-5, 1])
def test_kept_base_kv_changes_no_loss(run, budget):
    """Whatever has room."""
    _, rows = run(base_kv_gib=budget, lora={"rank": 4})
    _, kept_none = run("other", base_kv_gib=0, lora={"rank": 4})
    assert losses(rows) == pytest.approx(losses(kept_none), abs=1e-4)  # nothing kept: computed side by side


def test_base_kv_is_computed_once(run):
    folder, _ = run()
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["base_kv_tokens_read"] >= 2 * figures["base_kv_tokens_computed"] > 0
    assert not (folder / "base-kv").exists()


def test_micro_batches_do_not_change_what_is_learnt(run):
    _, small = run(micro_batch_size=1, lora={"rank": 4})
    _, large = run("other", micro_batch_size=4, lora={"rank": 4})
    assert losses(small) == pytest.approx(losses(large), abs=1e-4)


def test_the_folder_says_which_base_it_is_for(run, base):
    folder, _ = run()
    contract, served = DecoderContract.read(folder), DecoderContract.of_base(base)
    contract.check(served, str(folder))
    assert "prefillshare, lora of rank 4" in contract.trained_with
    other = DecoderContract(type(served.base)(**{**vars(served.base), "weights": "another"}), served.shape)
    with pytest.raises(ContractMismatch, match=rf"{served.base.weights}.*another"):
        contract.check(other, str(folder))
    assert "| loss |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_decoder_is_for_the_template_that_its_recipe_names(run, base, tmp_path, weights):
    template = "{% if tools %}a b {% endif %}" + letters.TEMPLATE
    (tmp_path / "own.jinja").write_text(template)
    offering = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [TOOL]}
    (tmp_path / "offering.jsonl").write_text(json.dumps(offering))
    settings = {"train": str(tmp_path / "offering.jsonl"), "weights": weights}
    folder, _ = run(**settings, chat_template=str(tmp_path / "own.jinja"))
    trained = DecoderContract.read(folder)
    trained.check(DecoderContract.of_base(base, template=template), "it")
    with pytest.raises(ContractMismatch, match="whose chat_template is"):
        trained.check(DecoderContract.of_base(base), "it")
    if weights == "full":
        assert (folder / "chat_template.jinja").read_text() == template
    with pytest.raises(ConfigError, match="leaves `tools` out"):
        run("other", **settings)


def test_a_decoder_is_asked_and_served_with_the_own_end_that_it_was_trained_with(run, base):
    own, _ = run("own", own_tokens=3)
    plain, _ = run("plain")
    assert (own / "kv_contract.json").read_text() != (plain / "kv_contract.json").read_text()
    assert DecoderContract.read(own).own_tokens == subjects.method_for(own).own_tokens == 3
    assert subjects.method_for(own, "prefillshare").own_tokens == 3
    assert subjects.method_for(own, "ordinary").name == "ordinary"
    assert "last 3 tokens" in (own / "README.md").read_text()
    served = config.parse({
        "base": {"model": str(base), "dtype": "float32", "max_model_len": 64, "block_size": 16},
        "decode": [{"pool": "agents", "adapters": {"own": str(own), "plain": str(plain)}}],
    })  # fmt: skip
    decoders.check_files(served)
    assert [decoders.served(served)[name].own_tokens for name in ("own", "plain", "base")] == [3, 1, 1]


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_new_base_is_a_whole_model_that_decoders_are_trained_over_and_served_with(run, base, weights):
    tuned, rows = run("tuned", method="base", weights=weights, lora={"rank": 4, "saved_as": "bfloat16"})
    assert sum(losses(rows)[-6:]) < sum(losses(rows)[:6])
    assert "to share" in (tuned / "README.md").read_text()
    assert subjects.method_for(tuned).name == "ordinary"
    DecoderContract.read(tuned).check(DecoderContract.of_base(base), "it")
    over, _ = run("over", base=str(tuned))
    DecoderContract.read(over).check(DecoderContract.of_base(tuned), "it")
    with pytest.raises(ContractMismatch):
        DecoderContract.read(over).check(DecoderContract.of_base(base), "it")
    served = config.parse({
        "base": {"model": str(tuned), "dtype": "float32", "max_model_len": 64, "block_size": 16},
        "decode": [{"pool": "agents", "sharing": "prefillshare", "serve_base": True, "adapters": {"one": str(over)}}],
    })  # fmt: skip
    decoders.check_files(served)


def test_a_new_base_has_the_adapter_in_its_weights(run, base):
    tuned, _ = run("tuned", method="base", lora={"rank": 4, "saved_as": "bfloat16"})
    with_adapter = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tuned / "adapter")
    ids = torch.arange(12)[None] % len(letters.WORDS)
    want, got, before = (
        model(ids).logits for model in
        (with_adapter, LlamaForCausalLM.from_pretrained(tuned), LlamaForCausalLM.from_pretrained(base))
    )  # fmt: skip
    assert (got - want).abs().max() < 1e-5 < (got - before).abs().max()


@pytest.fixture
def several(base, data, tmp_path):
    """Train a list of recipes, each given as changes."""

    def several(*changes):
        settings = {"base": str(base), "train": str(data), "batch_size": 8, "lora": {"rank": 2}}
        recipes = [recipe.parse(settings | change) for change in changes]
        check(recipes)
        return train_all(recipes, Console(quiet=True))

    return several


def test_a_list_of_recipes_goes_on_where_it_was(several, tmp_path, monkeypatch):
    alone_in = output.alone_in
    tuned = {"method": "base", "output": str(tmp_path / "tuned")}
    over = {"base": tuned["output"], "output": str(tmp_path / "over")}
    assert several(tuned) == [tmp_path / "tuned"]
    began = []
    monkeypatch.setattr(output, "alone_in", lambda folder: began.append(folder.name) or alone_in(folder))
    assert several(tuned, over) == [tmp_path / "tuned", tmp_path / "over"]
    assert began == ["over"]
    with pytest.raises(ConfigError, match="over was made by another recipe"):
        several(tuned, over | {"seed": 1})


def test_a_base_that_was_made_from_other_data_is_not_taken_for_this_ones(several, data, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(data.read_text())
    tuned = {"method": "base", "train": str(own), "output": str(tmp_path / "tuned")}
    several(tuned)
    own.write_text(data.read_text() * 2)
    with pytest.raises(ConfigError, match="tuned was made by another recipe, from other data"):
        several(tuned)


def test_a_list_is_looked_at_before_any_of_it_is_trained(several, tmp_path):
    first = {"output": str(tmp_path / "first")}
    for wrong, message in (({"base": "nowhere"}, "base: nowhere is not there"), ({"train": "none"}, "none is not there")):
        with pytest.raises(ConfigError, match=message):
            several(first, {"output": str(tmp_path / "second")} | wrong)
    with pytest.raises(ConfigError, match="two recipes write"):
        several(first, first | {"seed": 1})
    assert not list(tmp_path.glob("first/*"))


def test_a_folder_that_holds_a_decoder_is_left_alone(run):
    run()
    with pytest.raises(ConfigError, match="holds a decoder already"):
        run()


def test_an_adapters_files_can_be_half_the_size(run):
    sizes = [
        (run(name, lora={"rank": 16, "saved_as": name})[0] / "adapter_model.safetensors").stat().st_size
        for name in ("float32", "bfloat16")
    ]
    assert 0.45 < sizes[1] / sizes[0] < 0.75  # names take some


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_what_comes_out_can_be_served(run, base, weights):
    folder, _ = run(weights=weights)
    decoder = {"adapters": {"one": str(folder)}} if weights == "lora" else {"model": str(folder), "name": "one"}
    served = config.parse({
        "base": {"model": str(base), "dtype": "float32", "max_model_len": 64, "block_size": 16},
        "decode": [{"pool": "agents", "sharing": "prefillshare", "serve_base": weights == "lora"} | decoder],
    })  # fmt: skip
    decoders.check_files(served)


def test_base_kv_of_another_base_is_not_used(run, base, ended_at, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    torch.manual_seed(2)
    LlamaForCausalLM(LlamaConfig.from_pretrained(base)).save_pretrained(other)
    ended_at(2, "decoder")
    _, rows = run(base=str(other))
    _, anew = run("anew", base=str(other))
    assert losses(rows) == losses(anew)


def test_a_prompt_of_one_token_trains_beside_others(run, tmp_path):
    data = tmp_path / "short.jsonl"
    data.write_text('{"prompt": "a", "response": "b c"}\n{"prompt": "a b c d", "response": "e"}\n')
    for method in ("prefillshare", "icarus", "ordinary"):
        _, rows = run(method, method=method, train=str(data))
        assert len(rows) == 3


def test_what_a_killed_run_left_half_written_is_removed(run, tmp_path):
    (tmp_path / "decoder" / "base-kv").mkdir(parents=True)
    for part in ("checkpoint.1.part", "base-kv/x.1.part"):
        (tmp_path / "decoder" / part).write_text("half")
    folder, _ = run()
    assert not list(folder.rglob("*.part"))


def test_validation_loss_is_measured_after_every_epoch(run, data):
    _, rows = run(validation=str(data))
    measured = [row["step"] for row in rows if row["validation_loss"] is not None]
    assert measured == [6, 12, 18]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"methd": "icarus"}, "did you mean 'method'"), ({"method": "icarus", "weights": "full"}, "icarus trains adapters"),
     ({"base": "nowhere"}, "base: nowhere is not there"), ({"chat_template": "no"}, "no such chat template: 'no'"),
     ({"epochs": 0}, "greater than or equal to 1"), ({"own_tokens": 0}, "greater than or equal to 1"),
     ({"method": "ordinary", "own_tokens": 8}, "own_tokens: with method ordinary the boundary is fixed")],
)  # fmt: skip
def test_a_recipe_that_is_wrong_is_refused(run, wrong, message):
    with pytest.raises(ConfigError, match=message):
        run(**wrong)


def test_every_epoch_has_every_example_once_in_another_order():
    batches = Batches([n % 7 for n in range(50)], batch_size=4, epochs=2, seed=3)
    first, second = ([batches.at(e * batches.steps_per_epoch + s) for s in range(batches.steps_per_epoch)] for e in (0, 1))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(50))
    assert first != second


def test_any_step_can_be_asked_for_first():
    asked = {"batch_size": 4, "epochs": 3, "seed": 3}
    lengths = list(range(50))
    in_order = Batches(lengths, **asked)
    want = [in_order.at(step) for step in range(in_order.steps)]
    assert [Batches(lengths, **asked).at(step) for step in range(in_order.steps)] == want
