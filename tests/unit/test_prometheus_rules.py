"""The alert rules parse, fire when they should and not before, and ask only for metrics that are exported."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from kvshare.metrics import DEFINITIONS

RULES = Path(__file__).parents[2] / "deploy/prometheus/rules.yaml"
PROMTOOL = shutil.which("promtool")


def promtool(*arguments):
    if PROMTOOL is None:
        pytest.fail("these tests need promtool: apt-get install prometheus (make setup does where it may)")
    done = subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong():
    promtool("check", "rules", RULES)


def test_every_metric_asked_for_is_exported():
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        for name in re.findall(r"\bprefillshare[\w:]+", rule["expr"]):
            assert name in recorded or re.sub(r"_(sum|count|bucket)$", "", name) in DEFINITIONS, name


def test_every_alert_says_what_to_do():
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert {"summary", "description", "runbook"} <= rule["annotations"].keys()
                assert rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.parametrize(
    ("mean", "turns_per_hour", "fires"), [(0.4, 2, True), (0.2, 2, False), (0.4, 0.5, False)]
)
def test_a_decoder_that_drifted_is_told_of(tmp_path, mean, turns_per_hour, fires):
    """`quality_floor` 0.3; two days of samples; two routers each see a half of them."""
    half = turns_per_hour / 2 / 6
    series = [
        {"series": f'prefillshare_canary_divergence_{what}{{decoder="a", pod="{pod}"}}', "values": f"0+{each}x288"}
        for pod in "xy"
        for what, each in (("sum", half * mean), ("count", half))
    ]
    series += [{"series": f'prefillshare_quality_floor{{decoder="a", pod="{pod}"}}', "values": "0.3x288"} for pod in "xy"]
    expected = [
        {
            "exp_labels": {"severity": "warning", "decoder": "a"},
            "exp_annotations": {
                "summary": "a is farther from its own prefill than its quality_floor allows",
                "description": "Over the last day the sampled turns of a diverged by 0.4 nats on the mean. "
                "Other layers matter for the data it sees now.",
                "runbook": yaml.safe_load(RULES.read_text())["groups"][0]["rules"][1]["annotations"]["runbook"],
            },
        }
    ]
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "10m",
        "tests": [
            {
                "interval": "10m",
                "input_series": series,
                "alert_rule_test": [
                    {"eval_time": "47h", "alertname": "PrefillShareDecoderDrifted", "exp_alerts": expected if fires else []}
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    promtool("test", "rules", tmp_path / "test.yaml")
