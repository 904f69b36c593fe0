"""uv looks for packages where pip's configuration says, the environment before files."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "requirements/uv_settings.py"

LISTED = """\
:env:.find-links='/wheels'
:env:.no-input='1'
global.extra-index-url='https://one.example/simple https://two.example/simple'
global.find-links='/others /more'
global.index-url='https://three.example/simple'
"""


@pytest.fixture
def settings():
    spec = importlib.util.spec_from_file_location("uv_settings", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.settings


def test_each_option_has_its_variable(settings, monkeypatch):
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS"):
        monkeypatch.delenv(variable, raising=False)
    assert settings(LISTED) == {
        "UV_DEFAULT_INDEX": "https://three.example/simple",
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "UV_FIND_LINKS": "/wheels",
    }


def test_what_is_set_for_uv_itself_stays(settings, monkeypatch):
    monkeypatch.setenv("UV_INDEX", "https://own.example/simple")
    assert "UV_INDEX" not in settings(LISTED)


def test_several_folders_are_told_apart(settings, monkeypatch):
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    assert settings("global.find-links='/others /more'")["UV_FIND_LINKS"] == "/others,/more"


def test_without_a_configuration_there_is_nothing_to_tell(settings):
    assert settings("") == {}
