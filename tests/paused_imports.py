"""Hooks for conftest files: no garbage collection while pytest imports the tests (kvshare_vllm/engine/quick_start.py)."""

from prefillshare.kvshare_vllm.engine import quick_start


def pytest_sessionstart():
    quick_start.pause()


def pytest_collection_finish():
    quick_start.resume()
