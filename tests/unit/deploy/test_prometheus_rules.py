"""The alert rules parse, fire when they should and not before, and ask only for metrics that are exported."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from prefillshare.kvshare.metrics import DEFINITIONS

pytestmark = pytest.mark.slow

RULES = Path(__file__).parents[3] / "deploy/prometheus/rules.yaml"
PROMTOOL = shutil.which("promtool")


def promtool(*arguments):
    if PROMTOOL is None:
        pytest.fail("these tests need promtool: apt-get install prometheus (make setup does where it may)")
    done = subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def alert(name: str) -> dict:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return next(rule for rule in rules if rule.get("alert") == name)


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
                "runbook": alert("PrefillShareDecoderDrifted")["annotations"]["runbook"],
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


TURNS = 'prefillshare_turns_total{decoder="a",outcome="%s"}'
TOKENS = 'prefillshare_prefill_tokens_total{decoder="a",source="%s"}'
CACHED = 'prefillshare_%s_cached_tokens_total{pool="prefill"}'
REPLICAS = 'prefillshare_replicas{pool="agents",state="%s"}'
BLOCKS = 'prefillshare_kv_blocks{pool="agents",state="%s"}'
TTFT = 'prefillshare_time_to_first_token_seconds_bucket{decoder="a",le="%s"}'
TURN = 'prefillshare_turn_seconds_bucket{decoder="a",le="%s"}'
PREFILLS = 'prefillshare_prefills_total{pool="agents",where="here",why="%s"}'
REFUSED = 'prefillshare_turns_refused_total{pool="agents",reason="%s"}'


@pytest.mark.parametrize(
    ("name", "series", "labels"),
    [
        # Per minute: one error of ten turns, of a hundred; a client's cancelling is none.
        ("PrefillShareErrors", {TURNS % "ok": "0+9x60", TURNS % "Unavailable": "0+1x60"}, {}),
        ("PrefillShareErrors", {TURNS % "ok": "0+99x60", TURNS % "Unavailable": "0+1x60"}, None),
        ("PrefillShareErrors", {TURNS % "ok": "0+9x60", TURNS % "cancelled": "0+1x60"}, None),
        ("PrefillShareRefusing", {REFUSED % "too_late": "0+1x60"}, {"pool": "agents", "reason": "too_late"}),
        ("PrefillShareRefusing", {REFUSED % "tenant_limit": "0+1x60", REFUSED % "tokens_per_minute": "0+1x60"}, None),
        ("PrefillShareErrors", {TURNS % "ok": "0+9x60", TURNS % "limited": "0+9x60"}, None),
        ("PrefillShareUsageNotWritten", {"prefillshare_usage_unwritten_seconds": "0x30 30+60x30"}, {}),
        ("PrefillShareUsageNotWritten", {"prefillshare_usage_unwritten_seconds": "0 30 0 30 0 30x55"}, None),
        ("PrefillShareReplicaEjected", {'prefillshare_replicas{pool="agents",state="ejected"}': "1x60"}, {"pool": "agents"}),
        ("PrefillShareReplicaEjected", {'prefillshare_replicas{pool="agents",state="ejected"}': "0x58 1 1"}, None),
        ("PrefillShareKVLoadsFail", {'prefillshare_resumes_total{decoder="a",reason="kv_load_failed"}': "0+2x60"}, {}),
        ("PrefillShareKVLoadsFail", {'prefillshare_resumes_total{decoder="a",reason="preempted"}': "0+2x60"}, None),
        ("PrefillShareIndexIsWrong", {CACHED % "predicted": "0+6000x60", CACHED % "actual": "0+9000x60"}, {"pool": "prefill"}),
        ("PrefillShareIndexIsWrong", {CACHED % "predicted": "0+8500x60", CACHED % "actual": "0+9000x60"}, None),
        ("PrefillShareIndexIsWrong", {CACHED % "predicted": "0+6x60", CACHED % "actual": "0+9x60"}, None),
        ("PrefillSharePrefillMissing", {PREFILLS % "unavailable": "0+1x60"}, {"pool": "agents"}),
        ("PrefillSharePrefillMissing", {PREFILLS % "only": "0+1x60"}, None),
        ("PrefillShareDown", {}, {}),
        ("PrefillShareDown", {REPLICAS % "usable": "2x40 0x20", REPLICAS % "ejected": "0x60"}, {"pool": "agents"}),
        ("PrefillShareDown", {REPLICAS % "usable": "1x60", REPLICAS % "ejected": "1x60"}, None),
        # All turns between 5 and 10 s, between 2.5 and 5 s.
        ("PrefillShareSlowFirstToken",
         {TTFT % "5.0": "0x60", TTFT % "10.0": "0+9x60", TTFT % "+Inf": "0+9x60"}, {"decoder": "a"}),
        ("PrefillShareSlowFirstToken", {TTFT % "2.5": "0x60", TTFT % "5.0": "0+9x60", TTFT % "+Inf": "0+9x60"}, None),
        ("PrefillShareSlowTurns", {TURN % "60.0": "0x60", TURN % "120.0": "0+9x60", TURN % "+Inf": "0+9x60"}, {"decoder": "a"}),
        ("PrefillShareSlowTurns", {TURN % "30.0": "0x60", TURN % "60.0": "0+9x60", TURN % "+Inf": "0+9x60"}, None),
        ("PrefillShareKVFull", {BLOCKS % "used": "97x60", BLOCKS % "total": "100x60"}, {"pool": "agents"}),
        ("PrefillShareKVFull", {BLOCKS % "used": "90x60", BLOCKS % "total": "100x60"}, None),
        ("PrefillShareLateReads", {'prefillshare_late_reads_total{decoder="a"}': "0+1x60"}, {"decoder": "a"}),
        ("PrefillShareLateReads", {'prefillshare_late_reads_total{decoder="a"}': "3x60"}, None),
        # From 90 to 30 %, an hour ago or just now; and where there are hardly any prompts.
        ("PrefillShareHitRatioFell",
         {TOKENS % "cached": "0+9000x240 2160000+3000x60", TOKENS % "computed": "0+1000x240 240000+7000x60"}, {"decoder": "a"}),
        ("PrefillShareHitRatioFell",
         {TOKENS % "cached": "0+9000x285 2565000+3000x15", TOKENS % "computed": "0+1000x285 285000+7000x15"}, None),
        ("PrefillShareHitRatioFell", {TOKENS % "cached": "0+9x240 2160+3x60", TOKENS % "computed": "0+1x240 240+7x60"}, None),
    ],
)  # fmt: skip
def test_an_alert_fires_when_it_should_and_not_else(tmp_path, name, series, labels):
    """A sample a minute. `labels`: of the alert that fires; None: none does."""
    told = {"alertname": name, "alertstate": "firing", "severity": alert(name)["labels"]["severity"], **(labels or {})}
    shown = "ALERTS{" + ",".join(f'{label}="{value}"' for label, value in sorted(told.items())) + "}"
    minutes = 300 if "x240" in str(series) or "x285" in str(series) else 59
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [{
            "interval": "1m",
            "input_series": [{"series": metric, "values": values} for metric, values in series.items()],
            "promql_expr_test": [{
                "expr": f'ALERTS{{alertname="{name}",alertstate="firing"}}',
                "eval_time": f"{minutes}m",
                "exp_samples": [] if labels is None else [{"labels": shown, "value": 1}],
            }],
        }],
    }  # fmt: skip
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    promtool("test", "rules", tmp_path / "test.yaml")
