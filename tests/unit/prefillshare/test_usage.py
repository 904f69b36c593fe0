"""`prefillshare usage`: the ledger as a table, as JSON and as CSV."""

import csv
import io
import json
from datetime import date
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from prefillshare import usage
from prefillshare.cli import app
from prefillshare.kvshare.errors import Unavailable
from prefillshare.router.accounts.figures import Figures, Place, Row

FIRST, SECOND = date(2026, 12, 1), date(2026, 12, 2)
ROWS = [
    Row(Place(FIRST, "", "base"), Figures(1, 5, 0, 5, 2, 10)),
    Row(Place(FIRST, "acme", "tools"), Figures(2, 1_234_567, 1_000_000, 234_567, 890, 3 << 30)),
    Row(Place(SECOND, "acme", "tools"), Figures(1, 100_000_000, 90_000_000, 10_000_000, 10, 1 << 30)),
]


def handle(answer):
    def result(timeout_s):
        if isinstance(answer, Exception):
            raise answer
        return answer

    asked = []
    remote = SimpleNamespace(remote=lambda *args: asked.append(args) or SimpleNamespace(result=result))
    return SimpleNamespace(usage=remote, asked=asked)


def test_the_router_is_asked_for_the_days():
    router = handle(ROWS)
    assert usage.read(router, FIRST, SECOND) == ROWS
    assert router.asked == [(FIRST, SECOND)]


def test_days_in_the_wrong_order_are_refused_before_anything_is_connected():
    result = CliRunner().invoke(app, ["usage", "--since", "2026-12-02", "--until", "2026-12-01"])
    assert result.exit_code == 2
    assert "--since: 2026-12-02 is after 2026-12-01 (fix: give the earlier day there)" in result.stderr


def test_a_router_or_store_that_does_not_answer_is_a_typed_error():
    with pytest.raises(Unavailable, match="the ledger cannot be read: TimeoutError: 30 s"):
        usage.read(handle(TimeoutError("30 s")), None, None)


def test_figures_are_summed_over_days_or_told_apart_by_day():
    both = usage.summed(ROWS, by_day=False)
    assert both == {("", "base"): ROWS[0].figures, ("acme", "tools"): ROWS[1].figures.plus(ROWS[2].figures)}
    by_day = usage.summed(ROWS, by_day=True, tenant="acme")
    assert list(by_day) == [("2026-12-01", "acme", "tools"), ("2026-12-02", "acme", "tools")]


def test_json_has_every_digit_and_the_total():
    told = json.loads(usage.as_json(usage.summed(ROWS, by_day=True), by_day=True))
    assert told["rows"][1] == {
        "day": "2026-12-01", "tenant": "acme", "decoder": "tools", "turns": 2, "prompt_tokens": 1_234_567,
        "cached_tokens": 1_000_000, "computed_tokens": 234_567, "generated_tokens": 890, "kv_byte_seconds": 3 << 30,
    }  # fmt: skip
    assert told["total"]["generated_tokens"] == 902


def test_csv_has_a_line_for_each_row():
    lines = list(csv.DictReader(io.StringIO(usage.as_csv(usage.summed(ROWS, by_day=False), by_day=False))))
    assert [(line["tenant"], line["decoder"], line["prompt_tokens"]) for line in lines] == [
        ("", "base", "5"), ("acme", "tools", "101234567"),
    ]  # fmt: skip


@pytest.mark.parametrize("by_day", [False, True])
def test_the_table_is_whole_in_80_columns(by_day):
    console = Console(width=80, file=io.StringIO())
    console.print(usage.as_table(usage.summed(ROWS, by_day=by_day)))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    (line,) = [line for line in shown.splitlines() if line.lstrip().startswith("total")]
    assert line.split() == ["total", "4", "101.2", "M", "91.0", "M", "10.2", "M", "902", "4.0"]
    assert "(anonymous)" in shown
    assert ("2026-12-02" in shown) == by_day


@pytest.mark.parametrize(
    ("byte_seconds", "shown"), [(0, "0.0"), (4_019_442, "0.00374"), (3 << 30, "3.0"), (1 << 50, "1,048,576.0")]
)
def test_kv_is_shown_whether_it_is_little_or_much(byte_seconds, shown):
    console = Console(width=80, file=io.StringIO())
    console.print(usage.as_table({("a", "d"): Figures(kv_byte_seconds=byte_seconds)}))
    assert console.file.getvalue().split()[-1] == shown


def test_two_forms_at_once_are_refused():
    result = CliRunner().invoke(app, ["usage", "--json", "--csv"])
    assert result.exit_code == 2
    assert "--csv: --json and --csv exclude each other" in result.stderr
