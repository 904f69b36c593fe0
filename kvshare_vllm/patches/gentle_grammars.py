"""Engines' processes trust grammars that the router has tried, and compile them without holding up an engine's steps.

Otherwise a replica's event loop would convert each grammar once more to check it, and the engine would compile it with eight
threads of the same priority as those that compute the model.

Seam: vllm/sampling_params.py (SamplingParams._validate_structured_outputs), vllm/v1/structured_output/__init__.py
(StructuredOutputManager._create_grammar)

Goes when: vLLM can be told that a grammar has been checked, and compiles it at a lower priority than it computes.
"""

from __future__ import annotations

import os
import threading

#: Added to the process's niceness in threads that compile; threads that they start inherit it.
NICENESS = 10


def trust_the_router() -> None:
    """Called in a replica's own process. What arrives has passed kvshare_vllm/grammars/grammars.py, and names its backend."""
    from vllm import SamplingParams

    check = SamplingParams._validate_structured_outputs
    if hasattr(check, "unchecked"):
        return

    def only_what_was_not(self, *given):
        if self.structured_outputs is not None and self.structured_outputs._backend is None:
            check(self, *given)

    only_what_was_not.unchecked = check
    SamplingParams._validate_structured_outputs = only_what_was_not


def compile_behind_steps() -> None:
    """Called in an engine's process: from now on, grammars are compiled at a lower priority than its steps."""
    from vllm.v1.structured_output import StructuredOutputManager

    create = StructuredOutputManager._create_grammar
    if hasattr(create, "at_once"):
        return

    process = os.getpriority(os.PRIO_PROCESS, 0)

    def lower() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), process + NICENESS)  # clamped to the lowest priority

    def gently(self, request):
        if self._use_async_grammar_compilation:  # in a thread that only compiles, not in the one that steps
            lower()
        return create(self, request)

    gently.at_once = create
    StructuredOutputManager._create_grammar = gently
