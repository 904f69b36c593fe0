"""The accuracy study goes on where it was ended, and its page says what was found."""

import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy import asker as accuracy_asker
from benchmarks.accuracy import report as accuracy_report
from benchmarks.accuracy import rows as accuracy_rows
from prefillshare.kvshare.errors import ConfigError

SUITE = "arithmetic"
SETTINGS = accuracy.Settings(Path("base"), "cpu", 100, 10, 8, 1)
BASE = next(row for row in accuracy.ROWS if row.training is None)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Its questions are not really asked; `asked` says which would have been, `end_after` when somebody ends it."""
    study = SimpleNamespace(asked=[], end_after=None, weights="these")

    def answers(subject, task, questions, *_, **__):
        if study.end_after is not None and len(study.asked) >= study.end_after:
            raise KeyboardInterrupt
        study.asked += [question.name for question in questions]
        return ["no idea"] * len(questions)

    monkeypatch.setattr(accuracy_rows, "RUNS", tmp_path)
    monkeypatch.setattr(accuracy_asker.AutoTokenizer, "from_pretrained", lambda base: None)
    monkeypatch.setattr(accuracy_asker, "stop_ids", lambda *_: ())
    monkeypatch.setattr(accuracy_asker.subjects, "load", lambda *_, **__: None)
    monkeypatch.setattr(accuracy_asker.subjects, "load_base", lambda *_, **__: None)
    monkeypatch.setattr(accuracy_asker, "weights_of", lambda folder: study.weights)
    monkeypatch.setattr(accuracy_asker, "offline_answers", answers)
    study.right = lambda **more: accuracy.Asker(Path("base"), 100, 8, "cpu").right(BASE, None, SUITE, **more)
    return study


def test_no_question_is_asked_twice(study):
    study.end_after = 24
    with pytest.raises(KeyboardInterrupt):
        study.right()
    study.end_after = None
    assert study.right() == [False] * 100
    assert len(study.asked) == len(set(study.asked)) == 100
    assert study.right() == [False] * 100
    assert len(study.asked) == 100


def test_a_half_written_answer_is_asked_again(study, tmp_path):
    study.right()
    (file,) = (tmp_path / "answers").glob("*.jsonl")
    file.write_text(file.read_text()[:-5])
    study.right()
    assert study.asked[100:] == [study.asked[99]]


def test_answers_with_less_base_kv_are_others(study):
    study.right()
    study.right(share=0.5, most=10)
    assert len(study.asked) == 110


def test_a_part_of_the_questions_is_spread_over_all_and_asked_once(study):
    study.right(most=5)
    assert set(study.asked) == {f"{SUITE}_{number}" for number in (0, 100, 200, 300, 400)}
    study.right()
    assert len(study.asked) == len(set(study.asked)) == 100


def test_other_weights_or_other_words_are_asked_again(study, monkeypatch):
    study.right(most=5)
    study.weights = "others"
    study.right(most=5)
    assert len(study.asked) == 10
    monkeypatch.setattr("prefillshare.finetuning.tasks.arithmetic.SYSTEM", "Solve it.")
    study.right(most=5)
    assert len(study.asked) == 15


@pytest.mark.parametrize("study", accuracy.STUDIES.values(), ids=lambda study: study.name)
def test_every_training_is_a_recipe_with_a_folder_of_its_own(study, monkeypatch):
    monkeypatch.setattr("prefillshare.finetuning.recipe.Path.is_file", lambda path: True)  # the base need not be there
    recipes = {name: training.recipe(study) for name, training in accuracy.TRAININGS.items()}
    assert len({recipe.output for recipe in recipes.values()}) == len(recipes)
    assert recipes["PrefillShare, LoRA"].output == f"adapters/{study.name}"
    assert {(r.method, r.weights) for r in recipes.values()} == {
        ("prefillshare", "lora"), ("prefillshare", "full"), ("icarus", "lora"), ("ordinary", "full"), ("ordinary", "lora"),
    }  # fmt: skip
    assert len({(r.batch_size, r.max_tokens, r.train, r.epochs) for r in recipes.values()}) == 1


@pytest.mark.parametrize(("changes", "taken"), [({"micro_batch_size": 2}, True), ({"learning_rate": 0.5}, False)])
def test_a_decoder_that_is_there_is_taken_if_it_has_learnt_the_same(tmp_path, monkeypatch, changes, taken):
    recipe = accuracy.load(accuracy.STUDIES["tools"].recipe).model_copy(update={"output": str(tmp_path)})
    monkeypatch.setattr(accuracy, "train", lambda *_: pytest.fail("it was trained again"))
    monkeypatch.setattr(accuracy.output, "contract", lambda recipe: "contract")
    monkeypatch.setattr(accuracy.output.DecoderContract, "read", lambda folder: "contract")
    (tmp_path / "kv_contract.json").touch()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json") | changes))
    if taken:
        assert accuracy.trained(SETTINGS, Console(quiet=True), recipe) == tmp_path
    else:
        with pytest.raises(ConfigError, match="another recipe"):
            accuracy.trained(SETTINGS, Console(quiet=True), recipe)


def test_the_page_has_every_row_and_the_difference(tmp_path):
    reference = [True] * 6 + [False] * 4
    answers = {row.name: reference[::-1] if row.ordinary is None else reference for row in accuracy.ROWS}
    answers[accuracy.REFERENCE] = reference
    rows = {row.name: accuracy._figures(row, answers) for row in accuracy.ROWS}
    figures = {"loss": 0.5, "seconds": 90.0, "base_kv_bytes": 1024, "transcripts": 9, "epochs": 2,
               "device": "a GPU"}  # fmt: skip
    trainings = dict.fromkeys(accuracy.TRAININGS, figures)
    curve = {name: [{"share": share, **accuracy.shares(reference)} for share in (0, 1)] for name in accuracy.CURVE[1:]}
    curve["base"] = [{"share": 1, **accuracy.shares(reference)}]
    profile = {"layers": 30, "points": [{"layers": layers, "divergence": d, "low": 0.0, "high": 1.0, "agreement": 0.5,
                                         "examples": 8}
                                        for layers, d in (("none", 0.9), ("3-5", 0.4), ("2-5", 0.5))]}  # fmt: skip
    result = {
        "studies": {"tools": {"suites": {SUITE: {"rows": rows, "curve": curve}}, "trainings": trainings,
                              "profiles": {"full fine-tuning": profile}, "missing": ["ICaRus of rank 64"],
                              "data": {"suite": SUITE, "transcripts": 10}}},
        "config": {"curve_questions": 5}, "versions": {"torch": "2"}, "hardware": {"cpu": "a CPU", "cores": 2},
        "command": "make accuracy", "date": "2026-01-01T00:00", "revision": "abc",
    }  # fmt: skip
    page = accuracy_report.markdown(result)
    accuracy_report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    for row in accuracy.ROWS:
        assert f"| {row.name} | 60.0 |" in page
    assert "| ICaRus | 60.0 | 31.3 to 83.2 | +0.0 (" in page
    two_kinds = r"\| LoRA fine-tuning, naive sharing \| 60.0 \| 31.3 to 83.2 \| \+0.0 \([^|]*\) \| \+0.0 \([^|]*\) \|"
    assert re.search(two_kinds, page)
    assert "Full fine-tuning, served by DroidSpeak" in page
    assert "| 3-5 | 3 | 0.4000 |" in page
    assert "Not trained for this study: ICaRus of rank 64." in page
    assert "2-5" not in page  # fewer layers are better


def _mark(settings, console, folder, name):
    (folder / name).write_text(settings.device)


class PicklingPool(ThreadPoolExecutor):
    """For its calls what a pool of processes is, without the time that a process's imports take: all is pickled."""

    def submit(self, function, /, *arguments):
        return super().submit(_received, pickle.dumps((function, arguments)))


def _received(sent: bytes):
    function, arguments = pickle.loads(sent)
    return pickle.loads(pickle.dumps(function(*arguments)))


@pytest.fixture(params=["here", "in processes"])
def pool(request):
    if request.param == "here":
        yield None
        return
    with PicklingPool(1) as pool:
        yield pool


def test_every_piece_of_work_is_done(tmp_path, pool):
    pieces = [accuracy.Work(name, _mark, (tmp_path, name)) for name in "abc"]
    accuracy.all_done(pieces, SETTINGS, pool, Console(quiet=True))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys("abc", "cpu")


def test_a_failing_piece_of_work_is_not_passed_over(tmp_path, pool):
    with pytest.raises(FileNotFoundError):
        accuracy.all_done([accuracy.Work("a", _mark, (tmp_path / "absent", "a"))], SETTINGS, pool, Console(quiet=True))


def test_the_weights_of_a_decoder_that_has_answered_may_be_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_rows, "RUNS", tmp_path)
    monkeypatch.setattr(accuracy_asker.fingerprint, "weights", lambda folder: "these")
    (tmp_path / "model.safetensors").touch()
    assert accuracy_asker.weights_of(tmp_path) == "these"
    (tmp_path / "model.safetensors").unlink()
    assert accuracy_asker.weights_of(tmp_path) == "these"


def test_without_the_reference_nothing_is_compared(monkeypatch):
    monkeypatch.setattr(accuracy, "trained_for", lambda study: [accuracy.TRAININGS["ICaRus"]])
    with pytest.raises(SystemExit, match="full fine-tuning has not been trained"):
        accuracy.check_comparable(accuracy.STUDIES.values())


def test_what_is_there_of_another_recipe_is_not_compared(monkeypatch):
    def another(recipe):
        raise ConfigError(f"{recipe.output} was made by another recipe")

    monkeypatch.setattr(accuracy, "trained_for", lambda study: list(accuracy.TRAININGS.values()))
    monkeypatch.setattr("prefillshare.finetuning.recipe.Path.is_file", lambda path: True)
    monkeypatch.setattr(accuracy.output, "check_made_by", another)
    with pytest.raises(ConfigError, match="another recipe"):
        accuracy.check_comparable(accuracy.STUDIES.values())


def test_rows_without_a_decoder_are_left_out_and_nothing_is_asked_twice(monkeypatch):
    study = accuracy.STUDIES["arithmetic"]
    there = [accuracy.TRAININGS[name] for name in ("full fine-tuning", "ICaRus")]
    monkeypatch.setattr(accuracy, "trained_for", lambda study: there)
    rows = {row.name for row in accuracy.rows_of(study)}
    assert {"base", "full fine-tuning", "naive sharing", "ICaRus"} < rows
    assert not rows & {"PrefillShare, LoRA", "PrefillShare, full", "LoRA fine-tuning"}
    asked = [(work.arguments[1].name, *work.arguments[2:4]) for work in accuracy.questions_of(study, SETTINGS)]
    parts_of_the_curve = len(accuracy.SHARES) - 1
    assert len(asked) == len(set(asked)) == len(rows) + parts_of_the_curve


def test_decoders_of_unequal_data_are_not_compared(monkeypatch):
    transcripts = chain([2229, 545], repeat(2229))
    monkeypatch.setattr(accuracy, "trained_for", lambda study: list(accuracy.TRAININGS.values()))
    monkeypatch.setattr("prefillshare.finetuning.recipe.Path.is_file", lambda path: True)
    monkeypatch.setattr(accuracy.output, "check_made_by", lambda recipe: None)
    monkeypatch.setattr(accuracy, "_learnt", lambda training, study: {"transcripts": next(transcripts)})
    with pytest.raises(SystemExit, match="'LoRA fine-tuning': 545"):
        accuracy.check_comparable([accuracy.STUDIES["tools"]])
