"""`prefillshare status` shows what the router says, replicas that are in trouble too."""

from __future__ import annotations

import io
import json
from itertools import islice
from types import SimpleNamespace

import pytest
from rich.console import Console

from prefillshare import status
from prefillshare.kvshare.config import parse
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.replica_info import ReplicaStats

STATS = vars(ReplicaStats(active=3, queued_tokens=4096, running=2, waiting=1, blocks_used=50, blocks_total=200, preemptions=7))
WELL = {"node": "10.0.0.1", "pid": 42, "usable": True, "reason": ""}


@pytest.fixture
def handle(tmp_path):
    """A router that serves the base and an adapter whose files are not here."""
    for folder in ("base", "planner"):
        (tmp_path / folder).mkdir()
    deployment = parse({
        "base": {"model": str(tmp_path / "base")},
        "decode": [{"pool": "agents", "adapters": {"planner": str(tmp_path / "planner")}}],
    })  # fmt: skip
    answers = {
        "deployment": deployment.model_dump(mode="json"),
        "replica_info": {
            "prefill": {"p0": WELL, "p1": WELL | {"usable": False, "reason": "failed three turns"}},
            "agents": {"d0": WELL},
        },
        "replica_stats": {"prefill": {"p0": STATS}, "agents": {"d0": STATS | {"queued_tokens": 0, "stalled_s": 12.0}}},
    }
    return SimpleNamespace(**{
        name: SimpleNamespace(remote=lambda answer=answer: SimpleNamespace(result=lambda timeout_s: answer))
        for name, answer in answers.items()
    })  # fmt: skip


def shown(found: dict) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(status.tables(found))
    return console.file.getvalue()


def test_replicas_are_shown_with_their_queues_and_caches(handle):
    text = shown(status.seen(handle))
    assert "4,096 tokens" in text
    assert "50/200 (25%)" in text
    assert "no step for 12 s" in text


def test_a_replica_that_gets_no_turns_says_why(handle):
    (line,) = [line for line in shown(status.seen(handle)).splitlines() if "p1" in line]
    assert "ejected: failed three turns" in line
    assert "no answer" in line


def test_decoders_whose_files_are_elsewhere_are_shown_all_the_same(handle):
    found = status.seen(handle)
    assert [(d["decoder"], d["kind"], d["sharing"]) for d in found["decoders"]][-1] == ("planner", "lora", "prefillshare")
    assert found["decoders"][-1]["base_fingerprint"] is None
    assert "planner" in shown(found)


def test_a_router_that_does_not_answer_is_told_of_and_asked_again(handle, monkeypatch):
    monkeypatch.setattr(status.time, "sleep", lambda seconds: None)
    answers = iter([TimeoutError("30 s"), None])

    def result(timeout_s):
        if error := next(answers, None):
            raise error
        return {}

    stats = SimpleNamespace(remote=lambda: SimpleNamespace(result=result))
    silent = SimpleNamespace(**{**vars(handle), "replica_stats": stats})
    with pytest.raises(Unavailable, match="does not answer: TimeoutError"):
        status.seen(silent)
    answers = iter([TimeoutError("30 s"), None])
    first, second = islice(status._again(silent, json.dumps, 1.0), 2)
    assert "does not answer" in first
    assert json.loads(second)["replicas"]


def test_it_is_plain_data(handle):
    assert json.loads(json.dumps(status.seen(handle))) == status.seen(handle)
