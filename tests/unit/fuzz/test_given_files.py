"""Files that people write, mutated by hypothesis: a deployment, a recipe and a keys file are taken, or refused by a ConfigError
that names a field or the file. Nothing else comes out, whatever is in them."""

from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import LOOKED_AT, YAML_SCALARS, trees

from prefillshare.finetuning import recipe
from prefillshare.kvshare import config, decoders
from prefillshare.kvshare.config.access import Auth
from prefillshare.kvshare.errors import ConfigError
from prefillshare.router import tenants

ROOT = Path(__file__).parents[3]
FILES = {
    "deployment": [path.read_text() for path in sorted((ROOT / "deploy/configs").glob("*.yaml"))],
    "recipe": [path.read_text() for path in sorted((ROOT / "finetuning/recipes").glob("*.yaml"))],
    "keys": [path.read_text() for path in sorted((ROOT / "deploy/keys").glob("*.yaml"))],
}
#: Where YAML, Python and people stumble.
WORDS = st.sampled_from((
    "2026-13-45", "12:60:61", "1e999", ".nan", "-.inf", "0x", "0b2", "9" * 5000, "=", "<<", "~", "null", "yes", "NO",
    "!!binary 'x'", "!!set {a}", "!!omap [a: 1]", "!!timestamp 'x'", "!!int x", "!!python/name:os.system", "&a [*a]", "*nobody",
    "{? [a] : b}", "[" * 400 + "]" * 400, "\ufffd", "\x85", "\ufeff", "''", '"\\ud800"', "-1", "0", "1.5", "\t", "- a", "a: b",
    "|", "? ", "@", "`", "%TAG", "---", "...", "../../../../etc/passwd", "/dev/zero", "\\0",
))  # fmt: skip
@st.composite
def texts(draw, files):
    """A file with some lines changed."""
    lines = draw(st.sampled_from(files)).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        line, change = lines[at], draw(st.sampled_from(("value", "drop", "twice", "indent", "cut", "insert")))
        if change == "value":
            lines[at] = line.partition(":")[0] + ": " + draw(WORDS)
        elif change == "drop" and len(lines) > 1:
            del lines[at]
        elif change == "twice":
            lines.insert(at, line)
        elif change == "indent":
            lines[at] = " " * draw(st.integers(0, 8)) + line.lstrip()
        elif change == "cut":
            lines[at] = line[: draw(st.integers(0, len(line)))]
        else:
            place = draw(st.integers(0, len(line)))
            lines[at] = line[:place] + draw(st.text(max_size=5) | WORDS) + line[place:]
    return "\n".join(lines)


def taken_or_refused(read, what) -> None:
    try:
        read(what)
    except ConfigError as refusal:
        error = refusal
    else:
        return
    assert error.field or error.fix or "YAML" in error.message, error


def read_deployment(data) -> None:
    decoders.served(config.parse(data, ROOT))


def load_deployment(file: Path) -> None:
    decoders.served(config.load(file))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "given.yaml"


def load_keys(file: Path) -> None:
    tenants.load(Auth(keys_file=str(file)))


READERS = {"deployment": load_deployment, "recipe": recipe.load, "keys": load_keys}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_with_changed_lines_is_taken_or_refused(kind, file):
    @LOOKED_AT
    @given(texts(FILES[kind]))
    def mutated(text):
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        taken_or_refused(READERS[kind], file)

    mutated()


@pytest.mark.parametrize(("kind", "read"), [("deployment", read_deployment), ("recipe", recipe.parse)])
def test_data_with_changed_values_is_taken_or_refused(kind, read):
    @LOOKED_AT
    @given(st.sampled_from(FILES[kind]).map(yaml.safe_load).flatmap(partial(trees, scalars=YAML_SCALARS)))
    def mutated(data):
        taken_or_refused(read, data)

    mutated()
