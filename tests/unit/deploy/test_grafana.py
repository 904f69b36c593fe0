"""The dashboards are what their code says, and every query asks for metrics that are exported, by labels that they have."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefillshare.kvshare.metrics import DEFINITIONS
from prefillshare.kvshare.other_metrics import ENGINE_METRICS

FOLDER = Path(__file__).parents[3] / "deploy/grafana"
SPEC = importlib.util.spec_from_file_location("dashboards", FOLDER / "dashboards.py")
dashboards = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = dashboards  # dataclasses look there
SPEC.loader.exec_module(dashboards)

QUERIES = [(panel.title, query) for board in dashboards.BOARDS for panel in board.panels for query in panel.queries]
METRIC = re.compile(r"\b((?:prefillshare|vllm)_\w+?)(?:_bucket|_sum|_count)?(?:\{([^}]*)\})?(?=[\s\[\)]|$)")
RECORDED = re.compile(r"\bprefillshare:\w+:\w+")
RULES = yaml.safe_load((FOLDER.parent / "prometheus/rules.yaml").read_text())["groups"][0]["rules"]
VLLM = Path(*importlib.util.find_spec("vllm").submodule_search_locations)
#: vLLM's metrics as the installed version defines them.
DEFINED = {
    name.replace(":", "_")
    for file in ("v1/metrics/loggers.py", "v1/spec_decode/metrics.py", "distributed/kv_transfer/kv_connector/v1/nixl/stats.py")
    for name in re.findall(r'"(vllm:\w+)"', (VLLM / file).read_text())
}
LABELS = {name: metric.labels for name, metric in DEFINITIONS.items()}
LABELS |= {metric.name: metric.labels for metric in ENGINE_METRICS.values()}
#: Names of series that are exported.
SERIES = {series for metric in ENGINE_METRICS.values() for series in metric.series}


def test_vllm_still_has_the_metrics_that_are_exported():
    assert ENGINE_METRICS.keys() - DEFINED == set()


@pytest.mark.parametrize(("title", "query"), [(title, query) for title, query in QUERIES if "vllm_" in query])
def test_a_query_of_an_engines_metrics_asks_for_series_that_are_exported(title, query):
    assert set(re.findall(r"\bvllm_\w+", query)) - SERIES == set()


def test_the_files_are_up_to_date():
    made = {f"{board.uid}.json": dashboards.rendered(board) for board in dashboards.BOARDS}
    there = {file.name: file.read_text() for file in FOLDER.glob("*.json")}
    assert there == made, "run: python deploy/grafana/dashboards.py"


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_a_query_asks_for_what_is_exported(title, query):
    found, recorded = METRIC.findall(query), RECORDED.findall(query)
    assert set(recorded) <= {rule.get("record") for rule in RULES}
    assert found or recorded or "ALERTS" in query
    for name, labels in found:
        assert name in LABELS, name
        asked = set(re.findall(r"(\w+)=~", labels))
        assert asked <= {*LABELS[name], "le"}, (name, asked)
    grouped = {label for names in re.findall(r"by \(([^)]*)\)", query) for label in names.split(", ")} - {"le", "alertname"}
    exported = {label for name, _ in found for label in LABELS[name]}
    assert grouped <= exported


def test_promtool_can_parse_every_query(tmp_path):
    """As rules, with Grafana's variables put in."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.fail("this test needs promtool: apt-get install prometheus (make setup does where it may)")
    rules = [
        {"record": f"panel:{n}", "expr": query.replace("$__rate_interval", "1m")} for n, (_, query) in enumerate(QUERIES)
    ]
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUERIES)} rules found" in done.stdout


def test_every_panel_says_what_to_do_and_every_query_its_name():
    for board in dashboards.BOARDS:
        for panel in json.loads(dashboards.rendered(board))["panels"]:
            if panel["type"] == "row":
                continue
            assert panel["description"].endswith(".")
            names = [target["refId"] for target in panel["targets"]]
            assert names == sorted(set(names))
            assert all(target["legendFormat"] for target in panel["targets"])


def test_every_metric_that_says_what_to_do_is_on_a_dashboard():
    shown = {name for _, query in QUERIES for name, _ in METRIC.findall(query)}
    assert set(DEFINITIONS) - shown == set()
