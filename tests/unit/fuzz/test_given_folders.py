"""Folders of models and adapters, mutated by hypothesis: a deployment with them is taken, or refused with the field that names
the folder."""

import json
import shutil
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import LOOKED_AT, changed_bytes, trees

from prefillshare.kvshare import config, decoders
from prefillshare.kvshare.errors import ConfigError, ContractMismatch

JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "kv_contract.json")


@pytest.fixture
def folders(model, adapter, tmp_path):
    """A base and its adapter, and a place for their changed copies."""
    base = model()
    return {"base": base, "adapter": adapter("good", base=base)}, tmp_path / "changed"


class Refused(Exception):
    """With a field, as it should be."""


def served(folders: dict) -> None:
    pool = {"pool": "agents", "adapters": {"good": str(folders["adapter"])}}
    settings = {"model": str(folders["base"]), "dtype": "float32", "max_model_len": 1024}
    try:
        decoders.check_files(config.parse({"base": settings, "decode": [pool]}))
    except (ConfigError, ContractMismatch) as error:
        raise Refused if error.field else error from None


def files(folders: dict) -> list[tuple[str, str]]:
    return [(which, file.name) for which, folder in folders.items() for file in sorted(folder.iterdir()) if file.is_file()]


@st.composite
def changes(draw, folders):
    """(which folder, file, its new content; None: it is taken away)."""
    which, name = draw(st.sampled_from(files(folders)))
    content = (folders[which] / name).read_bytes()
    kinds = ["bytes", "away"] + ["data"] * 3 * (name in JSON)
    kind = draw(st.sampled_from(kinds))
    if kind == "away":
        return which, name, None
    if kind == "data":
        return which, name, json.dumps(draw(trees(json.loads(content)))).encode()
    return which, name, draw(changed_bytes(content))


def test_a_changed_folder_is_taken_or_refused(folders):
    right, changed = folders
    served(right)

    @LOOKED_AT
    @given(changes(right))
    def mutated(change):
        which, name, content = change
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(right[which], changed)
        (changed / name).unlink()
        if content is not None:
            (changed / name).write_bytes(content)
        with suppress(Refused):
            served(right | {which: changed})

    mutated()
