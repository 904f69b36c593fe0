"""`base.chat_template`: found by name or path, checked before it is used, and part of what decoders are held to."""

import re
from pathlib import Path

import pytest
from rendered import Rendered

from prefillshare.kvshare import chat_template, config, decoders, fingerprint
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.errors import ConfigError, ContractMismatch

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def deploy(model, adapter):
    """deploy(template, contract's template=None) -> a deployment with one adapter of mode prefillshare and one of mode none."""

    def make(given, trained_with=None, folder=None):
        base, pools = model(), []
        for number, sharing in enumerate(("prefillshare", "none")):
            made = adapter(f"a{number}")
            DecoderContract.of_base(base, template=trained_with).write(made)
            pools.append({"pool": f"p{number}", "sharing": sharing, "adapters": {f"a{number}": str(made)}})
        settings = {"model": str(base), "dtype": "float32", "max_model_len": 64, "chat_template": given}
        return config.parse({"base": settings, "decode": pools}, folder)

    return make


def test_templates_of_ours_and_of_vllm_have_names_and_ours_come_first():
    names = chat_template.shipped()
    assert next(iter(names)) == "smollm2_tools"
    assert {"smollm2_tools", "template_chatml"} <= names.keys()
    assert "im_start" in chat_template.text_of("template_chatml")


def test_a_name_stays_a_name_and_a_file_becomes_an_absolute_path(deploy, tmp_path):
    assert deploy("smollm2_tools").base.chat_template == "smollm2_tools"
    (tmp_path / "own.jinja").write_text(PLAIN)
    assert chat_template.found("own.jinja", tmp_path) == str(tmp_path / "own.jinja")
    assert chat_template.text_of(str(tmp_path / "own.jinja")) == PLAIN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such chat template: 'own\.jinja' \(looked for \S+ or \S+\)"),
        (b"\xff\xfe", "cannot read the chat template .*own.jinja: 'utf-8' codec"),
        (b" \n", "the chat template .*own.jinja is empty"),
        (b"{% for m in messages %}\n", "the chat template .*own.jinja is no Jinja: line 1: Unexpected end of template"),
    ],
)
def test_a_file_that_is_no_template_is_refused_with_field_and_fix(deploy, tmp_path, content, message):
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^base.chat_template: {message}") as caught:
        deploy("own.jinja", folder=tmp_path)
    assert caught.value.field == "base.chat_template"
    assert caught.value.fix


def test_tags_that_transformers_adds_are_no_errors(tmp_path):
    text = "{% for m in messages %}{%- generation %}{{ m }}{% endgeneration -%}{% break %}{% endfor %}"
    (tmp_path / "own.jinja").write_text(text)
    assert chat_template.text_of(str(tmp_path / "own.jinja"))


def test_a_decoder_that_was_trained_with_another_template_is_refused_in_sharing_pools_only(deploy, tmp_path):
    (tmp_path / "own.jinja").write_text(PLAIN)
    with pytest.raises(ContractMismatch, match="whose chat_template is") as caught:
        decoders.check_files(deploy("own.jinja", folder=tmp_path))
    assert caught.value.field == "decode.0.adapters.a0"
    assert fingerprint.of_text(PLAIN) in caught.value.message


def test_a_decoder_that_was_trained_with_the_template_is_served_with_it(deploy, tmp_path):
    (tmp_path / "own.jinja").write_text(PLAIN)
    base = decoders.check_files(deploy("own.jinja", trained_with=PLAIN, folder=tmp_path))
    assert base.base.chat_template == fingerprint.of_text(PLAIN)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (PLAIN, ""),
        ("{% for m in messages %}", "does not render: .*end of template"),
        ("{{ messages[0]['name'].upper() }}", "does not render: .*has no attribute 'name'"),
        ("{{ raise_exception('users speak second') }}", "does not render: users speak second"),
        ("hello", "leaves the messages' content out"),
    ],
)
def test_a_template_that_cannot_lay_out_a_conversation_is_told(template, problem):
    found = chat_template.problem(Rendered(template))
    assert re.search(problem, found) if problem else found == ""


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (PLAIN, "has no place for tools"),
        ("{{ tools | tojson }}" + PLAIN, ""),
        ("{{ tools | length }} tools" + PLAIN, "has no place for tools"),
        ("{{ tools[0].name.upper() }}", "does not render with tools"),
    ],
)
def test_a_template_that_ignores_tools_is_told(template, problem):
    found = chat_template.tools_problem(Rendered(template))
    assert problem in found if problem else found == ""


def test_every_template_of_ours_renders_and_shows_tools():
    for name, file in chat_template.shipped().items():
        if file.parent == Path(chat_template.__file__).with_name("chat_templates"):
            tokenizer = Rendered(chat_template.text_of(name))
            assert (chat_template.problem(tokenizer), chat_template.tools_problem(tokenizer)) == ("", ""), name
