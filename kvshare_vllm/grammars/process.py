"""A process that compiles grammars, each in a child of its own that can be killed:
`python -m prefillshare.kvshare_vllm.grammars.process`.

1. The first line of standard input is the tokenizer's information, as xgrammar serialises it.
2. Every further line is a job: {"id", "kind", "spec", "cpu_s", "wall_s"}. A child compiles it as an engine will, and then
   takes some steps with it as an engine's would: a grammar that compiles at once can still take seconds per token.
3. Every line of standard output is a verdict: {"id", "problem"}; "problem" is null for a grammar that is cheap and enforced.

A child may use `cpu_s` of CPU time, however busy the cores are, and MORE_MEMORY_BYTES. When standard input ends, the process
and its children end.

Seam: vllm/v1/structured_output/backend_xgrammar.py (XgrammarBackend.compile_grammar)
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import selectors
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xgrammar

from prefillshare.kvshare_vllm.grammars.client import DIED, TOO_MUCH_CPU, TOO_MUCH_TIME

THREADS, NICENESS = 2, 10
MORE_MEMORY_BYTES = 2 << 30
#: Steps tried, and the CPU seconds that one of them may take, which delay every request in the batch.
STEPS, MOST_STEP_S = 64, 0.02


def compiled(info: xgrammar.TokenizerInfo, kind: str, spec: str) -> xgrammar.CompiledGrammar:
    compiler = xgrammar.GrammarCompiler(info, max_threads=THREADS, cache_enabled=False)
    match kind:
        case "json":
            return compiler.compile_json_schema(spec, any_whitespace=True)
        case "regex":
            return compiler.compile_regex(spec)
        case "grammar":
            return compiler.compile_grammar(spec)
        case "lark":
            return compiler.compile_lark(spec)
        case "structural_tag":
            tag = json.loads(spec)
            if "structures" not in tag:
                return compiler.compile_structural_tag(spec)
            items = [
                xgrammar.StructuralTagItem(begin=s["begin"], schema=json.dumps(s["schema"]), end=s["end"])
                for s in tag["structures"]
            ]
            return compiler.compile_structural_tag(items, tag["triggers"])
    raise ValueError(f"unknown kind {kind!r}")


def dearest_step_s(info: xgrammar.TokenizerInfo, grammar: xgrammar.CompiledGrammar) -> float:
    """CPU seconds of the costliest step, over a response of the longest tokens and one of random ones. Stops at MOST_STEP_S."""
    lengths = np.array([len(token) for token in info.decoded_vocab])
    lengths[list({*info.special_token_ids, *info.stop_token_ids})] = 0
    mask, chance, dearest = xgrammar.allocate_token_bitmask(1, info.vocab_size), random.Random(0), 0.0
    for of_any in (False, True):
        matcher = xgrammar.GrammarMatcher(grammar)
        for _ in range(STEPS):
            began = time.process_time()
            matcher.fill_next_token_bitmask(mask)
            step_s = time.process_time() - began
            allowed = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[: len(lengths)].astype(bool) & (lengths > 0)
            tokens = np.flatnonzero(allowed)
            if not len(tokens):
                break
            token = int(chance.choice(tokens) if of_any else tokens[lengths[tokens].argmax()])
            began = time.process_time()
            matcher.accept_token(token)
            dearest = max(dearest, step_s + time.process_time() - began)
            if dearest > MOST_STEP_S or matcher.is_terminated():
                break
    return dearest


def problem_of(info: xgrammar.TokenizerInfo, kind: str, spec: str) -> str | None:
    """What is wrong with a grammar; None if nothing is. Runs in a process that may be killed meanwhile."""
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)  # xgrammar warns there of what it leaves out
        try:
            grammar = compiled(info, kind, spec)
        except Exception as error:
            return f"it cannot be compiled: {_plain(str(error))}"
        said.seek(0)
        if left_out := re.findall(r"Warning: (.*)", said.read().decode(errors="replace")):
            return f"not all of it can be enforced: {left_out[0]}"
    if (step_s := dearest_step_s(info, grammar)) > MOST_STEP_S:
        return f"a token of it takes {1000 * step_s:.0f} ms of CPU time, at most {1000 * MOST_STEP_S:.0f} ms are allowed"
    return None


def _plain(text: str) -> str:
    """The message without its position in xgrammar's sources."""
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", text).strip()


def serve(info: xgrammar.TokenizerInfo, jobs: int = 0, verdicts: int = 1) -> None:
    """Take jobs until `jobs` (a file descriptor) ends. Single-threaded, so that it may fork."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(jobs, selectors.EVENT_READ)
        running: dict[int, tuple[int, int, float]] = {}
        rest = b""
        while True:
            soonest = min((ends for _, _, ends in running.values()), default=None)
            ready = waiting.select(None if soonest is None else max(0.0, soonest - time.monotonic()))
            for key, _ in ready:
                if key.fd != jobs:
                    waiting.unregister(key.fd)
                    _tell(verdicts, *_ended(key.fd, *running.pop(key.fd)[:2]))
                    continue
                read = os.read(jobs, 1 << 16)
                if not read:
                    for _, child, _ in running.values():
                        os.kill(child, signal.SIGKILL)
                    return
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    job = json.loads(line)
                    result, child = _begun(info, job, (jobs, verdicts))
                    running[result] = (job["id"], child, time.monotonic() + job["wall_s"])
                    waiting.register(result, selectors.EVENT_READ)
            for result, (number, child, ends) in list(running.items()):
                if time.monotonic() >= ends:
                    os.kill(child, signal.SIGKILL)
                    waiting.unregister(result)
                    os.close(result)
                    os.waitpid(child, 0)
                    del running[result]
                    _tell(verdicts, number, TOO_MUCH_TIME)


def _begun(info: xgrammar.TokenizerInfo, job: dict, ours: tuple[int, ...]) -> tuple[int, int]:
    """Begin a job. Returns (descriptor from which its child's answer is read, process id of the child)."""
    reads, writes = os.pipe()
    if child := os.fork():
        os.close(writes)
        return reads, child
    status = 1
    try:
        for descriptor in (reads, *ours):
            os.close(descriptor)
        signal.setitimer(signal.ITIMER_PROF, job["cpu_s"])  # SIGPROF ends it, in whatever code it is
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MORE_MEMORY_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(writes, json.dumps(problem_of(info, job["kind"], job["spec"])).encode())
        status = 0
    finally:
        os._exit(status)


def _ended(result: int, number: int, child: int) -> tuple[int, str | None]:
    """(number of the job, its verdict)."""
    with open(result, "rb") as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return number, json.loads(text)
    return number, TOO_MUCH_CPU if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF else DIED


def _tell(verdicts: int, number: int, problem: str | None) -> None:
    os.write(verdicts, json.dumps({"id": number, "problem": problem}).encode() + b"\n")


def main() -> None:
    os.nice(NICENESS)
    info = xgrammar.TokenizerInfo.deserialize_json(json.loads(sys.stdin.buffer.readline()))
    os.write(1, json.dumps({"id": "ready"}).encode() + b"\n")
    serve(info)


if __name__ == "__main__":
    main()
