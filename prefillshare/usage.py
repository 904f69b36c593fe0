"""`prefillshare usage`: what tenants have used of each decoder, from the ledger of a running deployment."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from prefillshare.kvshare.errors import InvalidInput, Unavailable
from prefillshare.router.accounts.figures import NOTHING, Figures, Row, total

#: Seconds within which the router has to answer.
ANSWER_S = 6.0
GIB = 2**30
#: How tables show the tenant of deployments without `router.auth`.
ANONYMOUS = "(anonymous)"
#: Column of a table -> what it shows.
_COLUMNS = {
    "turns": lambda used: _short(used.turns),
    "prompt": lambda used: _short(used.prompt_tokens),
    "cached": lambda used: _short(used.cached_tokens),
    "computed": lambda used: _short(used.computed_tokens),
    "generated": lambda used: _short(used.generated_tokens),
    "KV GiB s": lambda used: _short(_rounded(used.kv_byte_seconds / GIB)),
}

#: Who or what used it: day (if it is asked for), tenant, decoder.
Key = tuple[str, ...]


def read(handle, since: date | None, until: date | None) -> list[Row]:
    """The ledger's rows. Raises Unavailable if the router or its store does not answer."""
    try:
        return handle.usage.remote(since, until).result(timeout_s=ANSWER_S)
    except Exception as error:  # Ray has an exception for each way in which a router does not answer
        reason = getattr(error, "cause", None) or error
        text = f"the ledger cannot be read: {type(reason).__name__}: {reason}"
        raise Unavailable(text, fix="look at the router's log") from None


def summed(rows: Sequence[Row], *, by_day: bool, tenant: str | None = None) -> dict[Key, Figures]:
    """Figures by (day,) tenant and decoder. `tenant`: only this one's."""
    used: dict[Key, Figures] = defaultdict(lambda: NOTHING)
    for place, figures in rows:
        if tenant in (None, place.tenant):
            key = (*([place.day.isoformat()] if by_day else ()), place.tenant, place.decoder)
            used[key] = used[key].plus(figures)
    return dict(sorted(used.items()))


def as_table(used: dict[Key, Figures]) -> Table:
    """Days, where they are told apart, stand above their lines."""
    table = Table(box=box.SIMPLE, padding=0, pad_edge=False, collapse_padding=True, show_footer=True)
    for name in _names(by_day=False):
        table.add_column(name, overflow="fold")
    for column, show in _COLUMNS.items():
        table.add_column(column, justify="right", no_wrap=True, footer=show(total(used.values())))
    table.columns[0].footer = "total"
    shown_day: list[str] = []
    for (*day, tenant, decoder), figures in used.items():
        if day != shown_day:
            table.add_row(f"[bold]{day[0]}[/]")
            shown_day = day
        table.add_row(tenant or ANONYMOUS, decoder, *(show(figures) for show in _COLUMNS.values()))
    return table


def as_json(used: dict[Key, Figures], *, by_day: bool) -> str:
    rows: list[dict[str, Any]] = [
        dict(zip(_names(by_day), key, strict=True)) | figures._asdict() for key, figures in used.items()
    ]
    return json.dumps({"rows": rows, "total": total(used.values())._asdict()})


def as_csv(used: dict[Key, Figures], *, by_day: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*_names(by_day), *Figures._fields))
    writer.writerows((*key, *figures) for key, figures in used.items())
    return text.getvalue().rstrip("\n")


def _short(number: float) -> str:
    """Whole up to ten million, so that a line fits into 80 columns; the other forms have all digits."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= max(unit, 1e7):
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"


def _rounded(number: float) -> float:
    """To what is worth reading: three digits if it is small."""
    return float(f"{number:.3g}") if number < 100 else round(number, 1)


def _names(by_day: bool) -> tuple[str, ...]:
    return ("day", "tenant", "decoder") if by_day else ("tenant", "decoder")


def usage_command(
    name: str | None,
    address: str | None,
    since: date | None,
    until: date | None,
    tenant: str | None,
    *,
    by_day: bool,
    form: str,
) -> None:
    """Print what has been used. `form`: "table", "json" or "csv".

    Raises InvalidInput, ConfigError if nothing runs there or it is not clear which deployment is meant, and as `read` does."""
    from prefillshare import which
    from prefillshare.cluster import joined, running_handle

    if since and until and since > until:
        raise InvalidInput(f"{since} is after {until}", field="--since", fix="give the earlier day there")

    with joined(which.found(name, address).address):
        used = summed(read(running_handle(), since, until), by_day=by_day, tenant=tenant)
    if form == "table":
        Console().print(as_table(used))
    else:
        print((as_json if form == "json" else as_csv)(used, by_day=by_day))
