"""`prefillshare status` shows what the router and Ray Serve say, whole in 80 columns, replicas that are in trouble too."""

from __future__ import annotations

import io
import json
import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from prefillshare import status, status_view
from prefillshare.kvshare.config import parse
from prefillshare.kvshare.errors import ConfigError, Unavailable
from prefillshare.kvshare.replica_info import ReplicaStats
from prefillshare.records import Record
from prefillshare.which import Found

STATS = vars(ReplicaStats(active=3, queued_tokens=4096, running=2, waiting=1, blocks_used=50, blocks_total=200, preemptions=7))
WELL = {"node": "10.0.0.1", "pid": 42, "usable": True, "reason": ""}
NOW_S = 1_000_000.0
RECORD = Record("ferry", "127.0.0.1:6379", "/models/base", 8000, 9000, 7, NOW_S - 7_980)
FOUND = Found(RECORD.address, RECORD)


def counted(turns: int, failed: int = 0, cached: int = 0, computed: int = 0) -> dict[str, int]:
    return {"turns": turns, "failed": failed, "cached": cached, "computed": computed}


FIGURES = {
    "sessions": 12, "turns_in_progress": 2, "turns_waiting": 1,
    "decoders": {"base": counted(402, 0, 880, 120), "planner": counted(1_204, 3, 90, 10)},
}  # fmt: skip


def of_serve(replica: str, up_s: float, state: str = "RUNNING", node: str = "10.0.0.1", pid: int | None = 42) -> dict:
    return {"replica_id": replica, "state": state, "start_time_s": NOW_S - up_s, "node_ip": node, "pid": pid}


def part(*replicas: dict, status: str = "HEALTHY", message: str = "") -> dict:
    return {"replicas": list(replicas), "status": status, "message": message}


class Answer:
    def __init__(self, answer):
        self.answer = answer

    def remote(self):
        return self

    def result(self, timeout_s):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    results = result


@pytest.fixture
def system(tmp_path):
    """A router that serves the base and an adapter whose files are not here, and what Serve says of it."""
    for folder in ("base", "planner"):
        (tmp_path / folder).mkdir()
    deployment = parse({
        "name": "ferry",
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
        "figures": [FIGURES],
    }
    parts = {
        "router": part(of_serve("r0", 7_900)),
        "prefill": part(of_serve("p0", 7_950), of_serve("p1", 50)),
        "agents": part(of_serve("d0", 95), of_serve("d1", 3, "STARTING", "", None)),
    }
    return System(answers, parts)


class System:
    """`answers`: the router's, by method; `parts`: Serve's, by deployment."""

    def __init__(self, answers: dict, parts: dict):
        self.answers, self.parts = answers, parts

    @property
    def handle(self):
        asked = {name: Answer(answer) for name, answer in self.answers.items()}
        return SimpleNamespace(**asked, broadcast=lambda name: asked[name])

    def details(self, timeout_s: float) -> dict:
        if isinstance(self.parts, Exception):
            raise self.parts
        return {"deployments": self.parts}

    def seen(self, found: Found = FOUND) -> dict:
        return status.seen(self.handle, found, self.details, lambda: NOW_S)


def shown(found: dict, width: int = 80) -> str:
    """As `status` prints it, on a terminal of this width."""
    console = Console(width=width, file=io.StringIO(), soft_wrap=True, highlight=False)
    console.print(status_view.text(found, width))
    return console.file.getvalue()


def test_an_operator_sees_at_a_glance_what_runs_and_how_it_is_doing(system):
    text = shown(system.seen())
    head = text.split("\n\n")[0].replace(system.answers["deployment"]["base"]["model"], "BASE")
    assert re.sub(r"…\S+", "BASE", head) == """\
ferry   up 2 h 13 min
  base       BASE
             bfloat16
  HTTP       http://127.0.0.1:8000/v1
  gRPC       127.0.0.1:9000
  Ray        127.0.0.1:6379
  node       10.0.0.1
  turns      2 in progress, 1 waiting
             1,606 ended, 3 of them with an error
  KV hits    88.2 % of 1,100 prompt tokens were found cached
  sessions   12 of at most 10,000"""


def test_pools_are_shown_with_their_decoders_and_replicas(system):
    blocks = shown(system.seen()).strip().split("\n\n")[1:]
    assert blocks == ["""\
agents   mode prefillshare, 1 of 2 usable
  decoder  kind       turns      failed  KV hits
  base     base         402           0   88.0 %
  planner  lora       1,204           3   90.0 %
  replica process     state          up   run   wait queued    KV preempted
  d0           42    usable  1 min 35 s     2      1      0  25 %         7
    no step for 12 s
  d1               starting         3 s""", """\
prefill   1 of 2 usable
  replica process     state          up   run   wait queued    KV preempted
  p0           42    usable  2 h 12 min     2      1  4,096  25 %         7
  p1           42   ejected        50 s
    failed three turns""", """\
router   1 of 1 usable
  replica process     state          up
  r0           42    usable  2 h 11 min"""]  # fmt: skip


def test_the_page_for_operators_shows_what_it_looks_like():
    replica = {"node": "127.0.0.1", "usable": True, "reason": "", "state": "usable", "up_s": 1558.0}
    stats = {"running": 0, "waiting": 0, "queued_tokens": 0, "blocks_used": 0, "blocks_total": 100, "preemptions": 0,
             "stalled_s": 0.0}  # fmt: skip
    of_decoder = {"pool": "agents", "sharing": "prefillshare", "own_layers": [], "own_tokens": 1,
                  "base_fingerprint": "e4a03c3418142a07"}  # fmt: skip
    page = (Path(__file__).parents[3] / "docs/operations.md").read_text()
    found = {
        "deployment": {
            "name": "demo", "address": "127.0.0.1:37913", "http": "http://127.0.0.1:8000/v1", "grpc": "127.0.0.1:9000",
            "base": "/srv/models/smollm2-135m-instruct", "dtype": "float32", "up_s": 1567.0, "sessions": 12,
            "max_sessions": 10_000, "turns": {"in_progress": 2, "waiting": 0, "ended": 1_284, "failed": 3},
            "prompt_tokens": {"cached": 124_819, "computed": 33_581}, "hit_ratio": 0.788,
        },
        "decoders": [
            of_decoder | {"decoder": "base", "kind": "base", "turns": 402, "failed": 0, "hit_ratio": 0.542},
            of_decoder | {"decoder": "arithmetic", "kind": "lora", "turns": 403, "failed": 3, "hit_ratio": 0.935},
            of_decoder | {"decoder": "tools", "kind": "lora", "turns": 479, "failed": 0, "hit_ratio": 0.845},
        ],
        "replicas": [
            replica | {"pool": "agents", "replica": "jvf9o2ux", "pid": 14889,
                       "stats": stats | {"running": 2, "blocks_used": 25}},
            replica | {"pool": "prefill", "replica": "bvqha2x3", "pid": 14887,
                       "stats": stats | {"queued_tokens": 1024, "blocks_used": 6}},
            replica | {"pool": "prefill", "replica": "n02lp5tz", "pid": 15112, "usable": False, "state": "ejected",
                       "reason": "failed three turns in a row", "up_s": 72.0, "stats": None},
        ],
        "routers": [replica | {"pool": "router", "replica": "esk45q7c", "pid": 14945, "stats": None}],
    }  # fmt: skip
    assert f"```text\n{shown(found)}```" in page


LONG = "customer-support-escalation-planner-2026-11-rank16-v3.release-b"
REASON = "the engine made no step for 31 s while 12 calls were waiting, and three probes in a row have failed since: " * 3


@pytest.fixture
def long_names(system):
    """Everything as long as it may be: names of 63 characters, IPv6, a deep folder, large numbers, several nodes."""
    assert len(LONG) == 63
    pool = "p" + LONG[1:]
    deployment = system.answers["deployment"]
    deployment |= {"name": LONG, "decode": [deployment["decode"][0] | {"pool": pool}]}
    deployment["decode"][0] |= {"adapters": {LONG: "/models/" + "deep/" * 30 + "planner"}, "sharing": "prefillshare"}
    deployment["base"] |= {"model": "/mnt/shared/models/" + "deep/" * 30 + "Llama-3.1-8B-Instruct", "name": "b" + LONG[1:]}
    deployment["router"] |= {"host": "2001:db8:85a3:1234:5678:8a2e:370:7348", "http_port": 65535, "max_sessions": 10_000_000}
    nodes = ["2001:db8:85a3:1234:5678:8a2e:370:7348", "10.244.113.201"]
    busy = STATS | {"running": 1024, "waiting": 99_999, "queued_tokens": 9_999_999, "blocks_used": 393_216,
                    "blocks_total": 393_216, "preemptions": 9_999_999, "stalled_s": 86_400 * 40.0}  # fmt: skip
    members = {f"abcdefg{n}": {"node": nodes[n % 2], "pid": 4_194_304, "usable": n != 1, "reason": REASON if n == 1 else ""}
               for n in range(3)}  # fmt: skip
    system.answers["replica_info"] = {pool: members}
    system.answers["replica_stats"] = {pool: dict.fromkeys(("abcdefg0", "abcdefg1"), busy)}
    big = counted(999_999_999, 9_999_999, 10**12, 10**11)
    system.answers["figures"] = [{"sessions": 9_999_999, "turns_in_progress": 99_999, "turns_waiting": 99_999,
                                  "decoders": {LONG: big, "b" + LONG[1:]: big}}]  # fmt: skip
    system.parts = {
        pool: part(*(of_serve(one, 86_400 * 365, node=nodes[0], pid=4_194_304) for one in members)),
        "router": part(*(of_serve(f"router-{n}", 50, node=nodes[n], pid=4_194_304) for n in range(2))),
    }
    return system, pool


def test_it_is_whole_in_80_columns_however_long_names_and_numbers_are(long_names):
    system, pool = long_names
    found = system.seen(Found("[2001:db8:85a3:1234:5678:8a2e:370:7348]:65535"))
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 80
    flat = re.sub(r"\s+", " ", text)
    for whole in (LONG, pool, "b" + LONG[1:], *(f"abcdefg{n}" for n in range(3)), "router-0", "10.244.113.201", REASON.strip(),
                  "4194304 usable 365 d 0 h 1,024 99,999 10 M 100 % 10 M", "999,999,999 9,999,999 90.9 %",
                  "no step for 40 d 0 h",
                  "99,999 in progress, 99,999 waiting", "1,999,999,998 ended, 19,999,998 of them with an error",
                  "[2001:db8:85a3:1234:5678:8a2e:370:7348]:65535", "http://[2001:db8:85a3:1234:5678:8a2e:370:7348]:65535/v1",
                  "9,999,999 of at most 10,000,000", "2 of 3 usable"):  # fmt: skip
        assert whole in flat, whole
    (base,) = [line for line in text.splitlines() if line.startswith("  base  ")]
    assert base.endswith("/Llama-3.1-8B-Instruct")


def test_on_a_wider_terminal_paths_are_whole(long_names):
    system, _ = long_names
    assert system.answers["deployment"]["base"]["model"] in shown(system.seen(), 240)


def test_nothing_is_cut_where_there_is_no_terminal_or_a_narrow_one(system):
    assert shown(system.seen(), 40) == shown(system.seen(), 80)


def test_what_several_routers_have_counted_is_added_up_but_sessions_are_shared(system):
    system.answers["figures"] = [FIGURES, FIGURES | {"sessions": 13, "decoders": {"planner": counted(6, 1, 10, 90)}}]
    found = system.seen()
    one = found["deployment"]
    assert (one["sessions"], one["turns"]) == (13, {"in_progress": 4, "waiting": 2, "ended": 1_612, "failed": 4})
    assert {d["decoder"]: d["hit_ratio"] for d in found["decoders"]} == {"base": 0.88, "planner": 0.5}


def test_a_deployment_that_has_served_nothing_yet_is_shown_without_a_ratio(system):
    system.answers["figures"] = [FIGURES | {"decoders": {}, "sessions": 0}]
    found = system.seen()
    assert found["deployment"]["hit_ratio"] is None
    assert "KV hits    no prompt yet" in shown(found)
    assert re.search(r"planner +lora +0 +0 +-\n", shown(found))


def test_without_a_record_it_is_up_for_as_long_as_its_oldest_part(system):
    assert system.seen(Found("10.0.0.9:6379"))["deployment"]["up_s"] == 7_950
    system.parts = TimeoutError("the controller is being replaced")
    found = system.seen(Found("10.0.0.9:6379"))
    assert found["deployment"]["up_s"] is None
    assert shown(found).startswith("ferry\n")
    assert [one["state"] for one in found["replicas"]] == ["usable", "ejected", "usable"]


def test_a_replica_that_does_not_answer_is_told_from_one_that_gets_no_turns(system):
    system.answers["replica_stats"] = {}
    assert {one["replica"]: one["state"] for one in system.seen()["replicas"]} == {
        "p0": "no answer", "p1": "ejected", "d0": "no answer", "d1": "starting",
    }  # fmt: skip


def test_decoders_whose_files_are_elsewhere_are_shown_all_the_same(system):
    found = system.seen()
    assert [(d["decoder"], d["kind"], d["sharing"]) for d in found["decoders"]][-1] == ("planner", "lora", "prefillshare")
    assert found["decoders"][-1]["base_fingerprint"] is None


def test_groups_of_own_layers_stand_below_their_decoder(system):
    found = system.seen()
    found["decoders"][1]["own_layers"] = ["4-9", "4-7"]
    assert "\n    own layers 4-9, 4-7\n" in shown(found)


def test_an_own_end_of_the_prompt_stands_below_its_decoder(system):
    found = system.seen()
    assert {decoder["own_tokens"] for decoder in found["decoders"]} == {1}
    found["decoders"][1]["own_tokens"] = 32
    assert shown(found).count("\n    computes a prompt's last 32 tokens itself\n") == 1


def test_a_router_that_does_not_answer_is_told_with_what_serve_says_of_all_parts(system):
    system.answers["deployment"] = TimeoutError("6 s")
    system.parts["prefill"] |= {"status": "UNHEALTHY", "message": "a replica died"}
    with pytest.raises(Unavailable) as told:
        system.seen()
    assert told.value.message.splitlines() == [
        "the router does not answer: TimeoutError: 6 s", "  agents: healthy", "  prefill: unhealthy a replica died",
        "  router: healthy",
    ]  # fmt: skip
    system.parts = TimeoutError("1 s")
    with pytest.raises(Unavailable, match="and Ray Serve does not answer either: TimeoutError"):
        system.seen()


def test_it_is_asked_again_until_it_answers(system, monkeypatch):
    monkeypatch.setattr(status.time, "sleep", lambda seconds: None)
    answers = iter([TimeoutError("6 s"), {}])

    def ask():
        system.answers["replica_stats"] = next(answers)
        return system.seen()

    first, second = islice(status._again(ask, json.dumps, 1.0), 2)
    assert "does not answer" in first
    assert json.loads(second)["replicas"]


def test_another_deployment_than_the_named_one_is_refused(system):
    with pytest.raises(ConfigError, match=r"--name: the deployment at 127\.0\.0\.1:6379 is called ferry"):
        status._asked(system.handle, FOUND, system.details, "coder")
    assert status._asked(system.handle, FOUND, system.details, "ferry")["deployment"]["name"] == "ferry"


def test_the_same_is_there_as_plain_data(system):
    found = system.seen()
    assert json.loads(json.dumps(found)) == found
    one = found["deployment"]
    assert (one["name"], one["address"], one["sessions"], one["hit_ratio"], one["up_s"]) == (
        "ferry", "127.0.0.1:6379", 12, 0.8818, 7_980,
    )  # fmt: skip
    assert one["turns"] == {"in_progress": 2, "waiting": 1, "ended": 1_606, "failed": 3}
    assert [one["replica"] for one in found["routers"]] == ["r0"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (307, "5 min 7 s"), (7_980, "2 h 13 min"), (86_400, "1 d 0 h"), (1e7, "115 d 17 h")],
)
def test_durations_are_in_their_two_largest_units(seconds, text):
    assert status_view.duration(seconds) == text
