"""docs/security.md: every threat names tests that are there, or says openly that there is none."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text()
NO_TEST = "no test"
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def threats() -> list[list[str]]:
    """The rows of the table of threats, each with its cells."""
    section = PAGE.split("\n## Threats\n")[1].split("\n## ")[0]
    _, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def is_there(file: str, test: str) -> bool:
    path = ROOT / file
    return path.is_file() and re.search(rf"^ *(?:async )?def {test}\(", path.read_text(), re.M) is not None


def test_every_test_that_it_names_is_there():
    named = _NAMED.findall(PAGE)
    assert len(named) == PAGE.count("::test_"), "each stands between backquotes, with its file"
    assert [f"{file}::{test}" for file, test in named if not is_there(file, test)] == []


def test_a_test_that_is_not_there_would_be_noticed():
    here = "tests/unit/project/test_security_page.py"
    assert is_there(here, "test_every_test_that_it_names_is_there")
    assert not is_there(here, "test_every_test_that_it_names")
    assert not is_there("tests/unit/project/test_nothing.py", "test_every_test_that_it_names_is_there")


def test_every_threat_names_its_tests_or_says_that_there_is_none():
    assert [row for row in threats() if len(row) != 4] == []
    assert [row for row in threats() if bool(_NAMED.search(row[-1])) == (row[-1] == NO_TEST)] == []


def test_all_kinds_of_threats_are_there():
    assert len(threats()) >= 25
    kinds = {"keys", "tenants", "load", "requests", "browsers", "files", "network", "KV", "privacy", "Kubernetes"}
    assert {kind for kind, *_ in threats()} == kinds
