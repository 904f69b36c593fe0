"""What vLLM has against the engines of a deployment is said by the file's fields; what it has nothing against is remembered."""

import json
import sys

import pytest

from prefillshare import argument_check
from prefillshare.argument_check import Checked, check_arguments
from prefillshare.engines import engine_settings, fields
from prefillshare.kvshare import config
from prefillshare.kvshare.errors import ConfigError, EngineStartError

ASKED = "import sys, json; asked = json.load(sys.stdin); "


def answers(problems=(), unchecked="", warnings=()) -> tuple[str, ...]:
    """A child that answers so, whatever it is asked."""
    answer = json.dumps({"problems": list(problems), "unchecked": unchecked, "warnings": list(warnings)})
    return sys.executable, "-c", f"{ASKED}print({answer!r})"


#: A child that must not be asked.
NEVER = (sys.executable, "-c", "raise SystemExit(3)")


@pytest.fixture
def deployment(model, adapter, tmp_path):
    base, template = model(), tmp_path / "own.jinja"
    template.write_text((base / "chat_template.jinja").read_text())
    pools = [
        {"pool": "agents", "adapters": {"a": str(adapter("a", base=base))}},
        {"pool": "alone", "adapters": {"b": str(adapter("b"))}, "sharing": "none"},
        {"pool": "apart", "adapters": {"c": str(adapter("c"))}, "sharing": "none", "prefill": {}, "max_loras": 2},
    ]
    base = {"model": str(base), "max_model_len": 64, "tool_call_parser": "x", "chat_template": str(template)}
    return config.parse({"base": base, "prefill": {}, "decode": pools})


def test_every_engine_has_its_field(deployment):
    engines, named = engine_settings(deployment), fields(deployment)
    assert {name: named[name] for name in engines} == {
        "prefill": "prefill",
        "agents": "decode.0",
        "prefill-alone": "decode.1",
        "alone": "decode.1",
        "prefill-apart": "decode.2.prefill",
        "apart": "decode.2",
    }
    assert {name: settings.max_loras for name, (settings, _) in engines.items() if settings.max_loras != 8} == {
        "prefill-apart": 2,
        "apart": 2,
    }


def test_all_engines_are_asked_about_at_once_with_what_they_would_start_with(deployment, tmp_path):
    seen = tmp_path / "seen.json"
    good = (sys.executable, "-c", f"{ASKED}json.dump(asked, open({str(seen)!r}, 'w')); "
            "print(json.dumps({'problems': [], 'unchecked': '', 'warnings': []}))")  # fmt: skip
    assert check_arguments(deployment, good) == Checked()
    asked = json.loads(seen.read_text())
    assert asked["base"] == {"model": deployment.base.model, "tool_call_parser": "x", "chat_template": "{{ messages }}"}
    assert asked["engines"].keys() == engine_settings(deployment).keys()
    assert asked["engines"]["apart"]["adapters"] == dict(deployment.decode[2].adapters)


def test_problems_are_named_by_the_files_fields_one_line_each(deployment):
    problems = [
        {"engine": "agents", "argument": "max_num_batched_tokens", "message": "too small"},
        {"engine": "prefill-alone", "argument": "engine_args.seed", "message": "no number"},
        {"engine": "alone", "argument": "engine_args.seed", "message": "no number"},
        {"engine": "", "argument": "tool_call_parser", "message": "no such parser"},
    ]
    with pytest.raises(ConfigError) as caught:
        check_arguments(deployment, answers(problems))
    assert caught.value.field == "decode.0.max_num_batched_tokens"
    assert caught.value.message == "too small\n  decode.1.engine_args.seed: no number\n  base.tool_call_parser: no such parser"


def test_a_good_answer_is_remembered_for_the_same_engines_only(deployment):
    assert check_arguments(deployment, answers()) == Checked()
    assert check_arguments(deployment, NEVER) == Checked()
    other = deployment.model_copy(update={"base": deployment.base.model_copy(update={"max_model_len": 128})})
    with pytest.raises(EngineStartError):
        check_arguments(other, NEVER)


def test_where_vllm_cannot_be_asked_the_reason_is_given_and_not_remembered(deployment):
    assert check_arguments(deployment, answers(unchecked="no device")) == Checked("no device")
    assert check_arguments(deployment, answers(unchecked="still none")) == Checked("still none")


def test_a_warning_is_told_again_at_every_start(deployment):
    for warning in ("tools are ignored", "tools are still ignored"):
        assert check_arguments(deployment, answers(warnings=[warning])) == Checked(warnings=(warning,))


def test_a_template_that_does_not_render_is_refused_with_its_own_fix(deployment):
    problem = {"engine": "", "argument": "chat_template", "message": "it does not render: why", "fix": "correct it"}
    with pytest.raises(ConfigError) as caught:
        check_arguments(deployment, answers([problem]))
    assert str(caught.value) == "base.chat_template: it does not render: why (fix: correct it)"


def test_where_vllm_is_not_installed_nothing_is_asked(deployment, monkeypatch):
    monkeypatch.setattr(argument_check, "vllm_build", lambda: "")
    assert check_arguments(deployment, NEVER) == Checked("vLLM is not installed here")


def test_a_child_that_fails_is_shown_with_what_it_said(deployment):
    failing = (sys.executable, "-c", "import sys; sys.stderr.write('no module called vllm'); raise SystemExit(3)")
    with pytest.raises(EngineStartError, match="status 3") as caught:
        check_arguments(deployment, failing)
    assert caught.value.log_tail == "no module called vllm"
