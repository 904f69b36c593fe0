"""The ways of training that are no features do what their pages say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.accuracy import hypotheses, making
from benchmarks.accuracy.levers import kv_maps
from benchmarks.accuracy.levers.distilled import Distilled
from benchmarks.accuracy.levers.joint import PREFILL, Joint
from benchmarks.accuracy.levers.kv_maps import KVMaps, Mapping
from prefillshare.finetuning import conditioned, recipe, subjects, train, transcripts
from prefillshare.finetuning.generate import generate
from prefillshare.finetuning.tokenizers import tokenizer_of
from tests import letters

pytestmark = pytest.mark.slow
CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return letters.write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def of(base, tmp_path):
    """A recipe on the letters."""

    def of(name="decoder", numbers=range(24), **changes):
        data = letters.write_transcripts(tmp_path / f"{name}.jsonl", numbers)
        settings = {
            "base": str(base), "train": str(data), "output": str(tmp_path / name), "epochs": 3, "batch_size": 4,
            "micro_batch_size": 4, "learning_rate": 5e-3, "lora": {"rank": 4},
        }  # fmt: skip
        return recipe.parse(settings | changes)

    return of


def examples(of: recipe.Recipe) -> list[transcripts.Example]:
    tokenizer = tokenizer_of(of.base, None)
    return transcripts.read(Path(of.train), tokenizer, transcripts.stop_ids(Path(of.base), tokenizer), of.max_tokens)[0]


def kv_of(decoder: train.Decoder, asked) -> conditioned.LayersKV:
    return decoder.base_kv([e.token_ids[: decoder.method.view(e).base_tokens] for e in asked])


def test_a_distilled_decoder_that_agrees_with_its_teacher_has_half_the_loss_left(of):
    taught = of("teacher", method="ordinary")
    teacher = train.train(taught, CONSOLE)
    asked, agreeing = examples(taught), Distilled(taught, teacher)
    likelihood = train.Decoder(taught).loss_sum(asked, None)
    assert agreeing.loss_sum(asked, None) > likelihood / 2 + 1  # it is the base still: it has to learn from the teacher
    agreeing.model.load_adapter(str(teacher), "agrees")
    agreeing.model.set_adapter("agrees")
    divided = conditioned.loss_sum(agreeing.model, conditioned.make_batch(agreeing.method, asked, None, "cpu"))
    assert agreeing.loss_sum(asked, None).item() == pytest.approx(divided.item() / 2, rel=1e-4)


def test_a_decoder_learns_with_maps_and_answers_through_them(of, base):
    recipe_of = of(epochs=20)
    decoder = Mapping(recipe_of, rank=4)
    asked = examples(recipe_of)
    plain = train.Decoder(recipe_of)
    without_maps = plain.loss_sum(asked, kv_of(plain, asked)).item()
    assert decoder.loss_sum(asked, kv_of(decoder, asked)).item() == pytest.approx(without_maps)
    folder = train.train(recipe_of, CONSOLE, decoder)
    decoder.save_maps(folder)
    assert KVMaps.read(folder).up.abs().max() > 0
    frozen = subjects.load_base(base)
    assert kv_maps.seen_by(None, frozen) is frozen
    seen = kv_maps.seen_by(folder, frozen)
    subject = subjects.load("it", base, folder, decoder.method, frozen=seen)
    one = asked[0]
    start, end = one.responses[0]
    decoder.model.eval()
    prompt = [one.token_ids[:start]]
    (answer,) = generate(decoder.method, subject.decoder, seen, prompt, max_tokens=end - start, stop_ids=())
    said = transcripts.Example((*prompt[0], *answer), ((start, start + len(answer)),))
    kv = [decoder.maps(number, *layer) for number, layer in enumerate(kv_of(decoder, [said]))]
    logits = conditioned.response_logits(decoder.model, conditioned.make_batch(decoder.method, [said], kv, "cpu"))
    assert logits.argmax(-1).tolist() == answer
    (unmapped,) = generate(decoder.method, subject.decoder, frozen, prompt, max_tokens=end - start, stop_ids=())
    assert unmapped != answer


def test_gradients_of_a_joint_loss_reach_the_prefill_module_and_the_decoders_that_are_asked(of):
    tasks = {"one": of("one", range(10)), "other": of("other", range(10, 20))}
    asked = {task: examples(tasks[task]) for task in tasks}
    joint = Joint(of(method="ordinary"), {e.token_ids: task for task in tasks for e in asked[task]}, tasks)
    with torch.no_grad():  # an adapter that adds nothing has no gradient in its first matrix
        for name, parameter in joint.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    joint.loss_sum(asked["one"][:2], None).backward()
    reached = {name.split(".")[-2] for name, p in joint.trainable().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {PREFILL, "one"}
    joint.loss_sum([asked["one"][0], asked["other"][0]], None).backward()
    reached = {name.split(".")[-2] for name, p in joint.trainable().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {PREFILL, "one", "other"}


def test_prefill_module_and_decoders_of_a_joint_training_are_a_base_and_its_decoders(of, monkeypatch, tmp_path, base):
    monkeypatch.setattr(hypotheses, "RUNS", tmp_path / "runs")
    (tmp_path / "runs" / "data").mkdir(parents=True)
    for name, numbers in (("home", range(10)), ("arithmetic", range(10, 20))):
        letters.write_transcripts(tmp_path / "runs" / "data" / f"{name}.jsonl", numbers)
    both = tmp_path / "runs" / "data" / "joint.jsonl"
    both.write_text("".join((tmp_path / "runs" / "data" / f"{name}.jsonl").read_text() for name in ("home", "arithmetic")))
    for name in ("joint", "joint-home", "joint-arithmetic"):
        changes = hypotheses.BY_NAME[name].changes | {"dtype": "float32", "learning_rate": 5e-3}
        monkeypatch.setitem(hypotheses.BY_NAME, name, replace(hypotheses.BY_NAME[name], changes=changes))
    joint = hypotheses.BY_NAME["joint"]
    made = joint.recipe(base)
    making.make(joint, [made], base, CONSOLE)
    making.make(joint, [made], base, CONSOLE)  # what is there is left alone
    for task in hypotheses.JOINT_TASKS:
        over = hypotheses.BY_NAME[f"joint-{task}"].recipe(base)
        making.make(hypotheses.BY_NAME[f"joint-{task}"], [over], base, CONSOLE)
        subjects.load(task, Path(over.base), Path(over.output), over.how)  # raises for another base
