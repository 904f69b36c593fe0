"""The main module of an engine's processes (quick_start.py)."""

from prefillshare.kvshare_vllm.engine import quick_start

quick_start.pause()
