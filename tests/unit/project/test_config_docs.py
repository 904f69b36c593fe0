"""docs/configuration.md says all there is to say about the config tree, and nothing that is no longer true."""

import re
from pathlib import Path

import pytest

from prefillshare import config_docs
from prefillshare.finetuning import training_docs
from prefillshare.finetuning.recipe import Lora, Recipe
from prefillshare.kvshare import config
from prefillshare.kvshare.config import access, placement, tree
from prefillshare.kvshare.modes import mode_names
from prefillshare.router.tenants import Tenant

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"
NODES = [config.Deployment, config.Base, config.Engines, config.Prefill, config.DecodePool]
NODES += [tree.Autoscale, placement.Placement, config.Router, config.Cluster, config.Logs, config.Tracing]
NODES += [access.Auth, access.Tls]
KEYS_FILE = [Tenant]


def test_page_is_up_to_date():
    assert PAGE.read_text() == config_docs.markdown(), "run: python -m prefillshare.config_docs > docs/configuration.md"


def test_list_of_nodes_is_the_tree():
    assert set(config.Deployment.model_json_schema()["$defs"]) == {node.__name__ for node in NODES} - {"Deployment"}


@pytest.mark.parametrize("node", NODES + KEYS_FILE, ids=lambda node: node.__name__)
def test_every_field_is_documented(node):
    assert node.__doc__
    assert [name for name, field in node.model_fields.items() if not (field.description or "").strip().endswith(".")] == []


def test_page_has_a_row_for_every_field():
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert rows == {name for node in NODES + KEYS_FILE for name in node.model_fields} | set(mode_names())


@pytest.mark.parametrize(
    "row",
    [
        "| `model` | string | **required** | Folder of the base model",
        "| `dtype` | `float32`, `bfloat16`, `float16` | `bfloat16` |",
        "| `http_port` | integer, >= 1, <= 65535 | `8000` |",
        "| `kv_cache_gib` | number, > 0 | `1` |",
        "| `serve_base` | `true`, `false` | `true` |",
        "| `max_num_batched_tokens` | integer, >= 16 | unset |",
    ],
)
def test_row_gives_values_range_and_default(row):
    assert f"\n{row}" in PAGE.read_text()


def test_the_training_page_is_up_to_date():
    wanted = training_docs.markdown()
    how = "run: python -m prefillshare.finetuning.training_docs > docs/training.md"
    assert (PAGE.parent / "training.md").read_text() == wanted, how
    for node in (Recipe, Lora):
        assert [name for name, field in node.model_fields.items() if not (field.description or "").strip().endswith(".")] == []
