"""Answers of rows on suites, kept in files: one per suite, decoder's weights and way of seeing context."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.accuracy import rows
from benchmarks.accuracy.levers import kv_maps
from benchmarks.accuracy.rows import Row
from prefillshare.finetuning import subjects
from prefillshare.finetuning.evaluate import evenly, offline_answers
from prefillshare.finetuning.tasks import TASKS, Question
from prefillshare.finetuning.transcripts import stop_ids
from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.layer_group import LayerGroup, layer_group
from prefillshare.kvshare.layer_profile import LayerProfile
from prefillshare.router.sessions.chat import ChatLayout

#: The type in which decoders are served on GPUs; on CPUs it takes half the time of float32.
DTYPE = torch.bfloat16
#: Memory for the base's KV of the questions, which all rows except one use.
KEPT_BYTES = 6 * 2**30
WEIGHTS = "weights.fingerprint"


class Asker:
    """`questions`: most questions of each suite, evenly spread."""

    def __init__(self, base: Path, questions: int | None, batch_size: int, device: str, kept_bytes: int = KEPT_BYTES):
        self._base, self._most, self._batch, self._device = base, questions, batch_size, device
        self._kept_bytes = kept_bytes
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._stops = stop_ids(base, self._tokenizer)
        self._frozen: subjects.FrozenBase | None = None
        self._subject: tuple[tuple, subjects.Subject] | None = None

    def questions(self, suite: str, most: int | None = None) -> list[Question]:
        """A suite's questions. `most`: only this many of them, evenly spread."""
        questions = TASKS[suite].questions()
        return evenly(questions, min(filter(None, (self._most, most, len(questions)))))

    def prompt_lengths(self, suite: str) -> list[int]:
        """Tokens of each question's prompt."""
        return [len(ChatLayout(self._tokenizer, q.tools).opening(list(q.messages))) for q in self.questions(suite)]

    def right(
        self,
        row: Row,
        decoder: Path | None,
        suite: str,
        share: float = 1.0,
        most: int | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[bool]:
        """For each question, whether its answer is right."""
        questions, group = self.questions(suite, most), self._group(row, decoder)
        own_tokens = subjects.method_for(decoder, row.method).own_tokens
        seen = row.method + (f"-own-{own_tokens}" if own_tokens > 1 else "")
        seen += (f"-{share:g}" if share < 1 else "") + (f"-layers-{group}" if group else "")
        seen += f"-tokens-{row.tokens:g}" if row.tokens else ""
        weights = weights_of(self._base), weights_of(decoder or self._base)
        key = _digest(*weights, TASKS[suite].max_tokens, str(DTYPE))
        file = rows.RUNS / "answers" / f"{suite}-{seen}-{key}.jsonl"
        with _alone_with(file):
            given = self._answered(row, decoder, suite, questions, group, share, file, advance)
        return [question.is_right(given[question.name]) for question in questions]

    def _answered(self, row, decoder, suite, questions, group, share, file, advance) -> dict[str, str]:
        """Question -> answer; questions whose answers are not in the file are asked."""
        given, asked = _lines(file), {q.name: _digest(q.messages) for q in questions}
        missing = [q for q in questions if (q.name, asked[q.name]) not in given]
        missing.sort(key=lambda question: sum(len(message["content"]) for message in question.messages))
        advance(len(questions) - len(missing))
        for first in range(0, len(missing), self._batch):  # answers are kept after every batch
            part = missing[first : first + self._batch]
            answers = offline_answers(
                self._load(row, decoder), TASKS[suite], part, self._tokenizer, stop_ids=self._stops, device=self._device,
                batch_size=self._batch, base_share=share, own_layers=group, own_share=row.tokens, advance=advance,
            )  # fmt: skip
            new = {(q.name, asked[q.name]): answer for q, answer in zip(part, answers, strict=True)}
            with file.open("a") as stream:
                lines = [{"question": name, "messages": digest, "answer": answer} for (name, digest), answer in new.items()]
                stream.write("".join(json.dumps(line) + "\n" for line in lines))
            given |= new
        return {q.name: given[q.name, asked[q.name]] for q in questions}

    def subject(self, row: Row, decoder: Path | None) -> subjects.Subject:
        if self._frozen is None:
            self._frozen = subjects.load_base(self._base, DTYPE, self._device, kept_bytes=self._kept_bytes)
        method = subjects.method_for(decoder, row.method)
        frozen = kv_maps.seen_by(decoder, self._frozen)
        return subjects.load(row.name, self._base, decoder, method, dtype=DTYPE, device=self._device, frozen=frozen)

    def _load(self, row: Row, decoder: Path | None) -> subjects.Subject:
        if self._subject is None or self._subject[0] != (decoder, row.method):
            self._subject = None  # two would not fit everywhere
            self._subject = ((decoder, row.method), self.subject(row, decoder))
        return self._subject[1]

    def _group(self, row: Row, decoder: Path | None) -> LayerGroup | None:
        if not row.layers:
            return None
        return layer_group(best_group(LayerProfile.read(decoder, self._base, weights_of), row.layers))


@contextmanager
def _alone_with(file: Path) -> Iterator[None]:
    """Lock an answers file. Two rows may share one (two shares of the layers with the same best group): one process asks, the
    other reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def weights_of(folder: Path) -> str:
    """Fingerprint of a model's or an adapter's weights. It is kept beside the weights, which are large and may be removed once
    they have answered all questions."""
    file = folder / WEIGHTS
    if not any(folder.glob("*.safetensors")):
        return file.read_text()
    found = fingerprint.weights(folder)
    if folder.is_relative_to(rows.RUNS) and (not file.is_file() or file.read_text() != found):
        file.write_text(found)
    return found


def best_group(profile: LayerProfile, share: float) -> str:
    """The group of least divergence among those with at most this share of the layers."""
    return [point for point in profile.frontier if point.size <= share * profile.layers][-1].layers


def _lines(file: Path) -> dict[tuple[str, str], str]:
    """(question, digest of its messages) -> answer. Cuts off a last line that was being written when a run ended."""
    if not file.is_file():
        return {}
    text = file.read_text()
    if rest := text[text.rfind("\n") + 1 :]:
        os.truncate(file, len((text[: -len(rest)]).encode()))
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return {(line["question"], line["messages"]): line["answer"] for line in lines}


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
