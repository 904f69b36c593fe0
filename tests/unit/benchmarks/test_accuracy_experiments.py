"""The experiments' part of docs/accuracy.md says what was found, and every experiment is a recipe of its own."""

from pathlib import Path

from benchmarks.accuracy import experiments_page
from benchmarks.accuracy.experiments import Measured, beside_earlier, figures_of, with_references
from benchmarks.accuracy.hypotheses import BY_NAME, EXPERIMENTS
from benchmarks.accuracy.rows import NAIVE, ROWS

_ROW = {"accuracy": 0.4, "low": 0.3, "high": 0.5}
#: The study has the two suites of tool calls, the second without a curve.
STUDY = {"studies": {"tools": {"suites": {
    "bfcl_simple_python": {"rows": {row.name: _ROW for row in ROWS}, "curve": {NAIVE: [_ROW | {"share": 0.5}]}},
    "bfcl_multiple": {"rows": {row.name: _ROW for row in ROWS}},
}}}}  # fmt: skip
REFERENCE = [True] * 6 + [False] * 4


def result(tmp_path, monkeypatch) -> dict:
    """Of made-up answers: the reference's, and for decoders over shared KV one right answer less."""
    monkeypatch.setattr("benchmarks.accuracy.hypotheses.RUNS", tmp_path)
    measured = {}
    for experiment in EXPERIMENTS:
        experiment.folder().mkdir()
        (experiment.folder() / "figures.json").write_text('{"transcripts": 9, "loss": 0.5, "seconds": 90, "device": "a CPU"}')
        answers = [True] * 5 + [False] * 5 if experiment.against else REFERENCE
        fed = [{"share": 1.0, "computed": 1.0, "accuracy": 0.1, "low": 0.0, "high": 0.3}] if experiment.is_fed_base_kv else []
        measured[experiment.name] = Measured(
            [dict.fromkeys(experiment.suites, answers)] * experiment.seeds, dict.fromkeys(experiment.suites, 17.0), fed
        )
    found = {name: figures_of(BY_NAME[name], one, measured.get(BY_NAME[name].against or "")) for name, one in measured.items()}
    return {
        "experiments": found, "missing": [], "versions": {"torch": "2"}, "hardware": {"cpu": "a CPU", "cores": 2},
        "command": "python -m", "date": "2026-01-01T00:00", "revision": "abc",
    }  # fmt: skip


def test_the_page_says_the_answer_first_and_every_experiment(tmp_path, monkeypatch):
    made = result(tmp_path, monkeypatch)
    page = experiments_page.markdown(made, "plot.png")
    assert "-10.0 (" in page.splitlines()[2]
    assert page.index("plot.png") < page.index("## Experiments")
    for experiment in EXPERIMENTS:
        rows = [line for line in page.splitlines() if line.startswith(f"| `{experiment.name}` |")]
        assert [row.split("|")[3].strip(" `") for row in rows] == list(experiment.suites)
        assert all(("-10.0 (" in row) == bool(experiment.against) for row in rows)
    experiments_page.plot(made, STUDY, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_an_experiment_that_was_not_trained_leaves_a_gap_in_the_plot_only(tmp_path, monkeypatch):
    made = result(tmp_path, monkeypatch)
    del made["experiments"]["joint"], made["experiments"]["home-ordinary"]
    experiments_page.plot(made, STUDY, tmp_path / "plot.png")
    assert "Not trained yet: joint." in experiments_page.markdown(made | {"missing": ["joint"]}, "plot.png")


def test_lines_of_the_plot_join_experiments_of_one_base_with_its_ordinary_fine_tunes():
    for _, shared, ordinary, _ in experiments_page.LINES.values():
        for suite in experiments_page.SUITES:
            assert len({BY_NAME[name].over for name in (*shared, *ordinary) if suite in BY_NAME[name].suites}) <= 1
        assert all(BY_NAME[name].against in ordinary for name in shared)
        assert all(BY_NAME[name].changes["method"] == "ordinary" for name in ordinary)


def test_figures_that_were_not_measured_again_are_kept_and_say_where_they_are_from(tmp_path, monkeypatch):
    earlier = result(tmp_path, monkeypatch)
    found = {"home": earlier["experiments"]["home"] | {"loss": 0.25}}
    before = {"date": "2025-12-31T00:00", "revision": "old", "hardware": {"cpu": "x", "gpu": "a GPU"}}
    earlier["experiments"]["base"] = earlier["experiments"]["base"] | {"measured": before}
    earlier["experiments"]["seen"] = earlier["experiments"]["seen"] | {"data": "other data than now"}
    earlier["experiments"]["joint"] = earlier["experiments"]["joint"] | {"verdict": "another than now"}
    every = beside_earlier(found, earlier)
    assert list(every) == [name for name in BY_NAME if name != "seen"]
    assert every["home"] == found["home"]
    assert every["joint"]["verdict"] == BY_NAME["joint"].verdict
    page = experiments_page.markdown(earlier | {"experiments": every}, "plot.png")
    where = "From an earlier run, on 2026-01-01 at revision abc, a CPU:"
    assert "From an earlier run, on 2025-12-31 at revision old, a GPU: `base`." in page
    (rest,) = [line for line in page.splitlines() if line.startswith(where)]
    assert "`home-ordinary`" in rest
    assert "`home`" not in rest


def test_what_is_named_is_measured_together_with_what_it_is_compared_with():
    assert with_references(["seen-home", "home"]) == ["home-ordinary", "home", "seen-home-ordinary", "seen-home"]
    assert with_references(list(BY_NAME)) == list(BY_NAME)


def test_every_experiment_is_a_recipe_with_a_folder_of_its_own(monkeypatch):
    recipes = {e.name: e.recipe(Path("model"), seed) for e in EXPERIMENTS for seed in range(e.seeds)}
    assert len({recipe.output for recipe in recipes.values()}) == len(recipes)
    for experiment in EXPERIMENTS:
        assert experiment.over is None or recipes[experiment.over].makes_base
        if reference := experiment.against:
            assert recipes[reference].method == "ordinary"
            assert recipes[reference].base == recipes[experiment.name].base
            assert recipes[reference].lora == recipes[experiment.name].lora
            assert recipes[reference].weights == recipes[experiment.name].weights
            assert BY_NAME[reference].suites == experiment.suites
