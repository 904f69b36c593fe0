"""The text of `prefillshare status`: whole in 80 columns, however long names are. What does not fit into its column has a line
of its own; only the beginning of a path is ever left out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

#: Number of characters of a fingerprint that are shown.
SHORT = 12
LEAST_COLUMNS = 80
_INDENT = "  "


@dataclass(frozen=True)
class Cell:
    text: str
    style: str = ""


def text(found: dict, width: int = LEAST_COLUMNS) -> Text:
    """`found`: what status.seen returns."""
    width = max(width, LEAST_COLUMNS)
    lines = [*_head(found, width)]
    pools = dict.fromkeys(one["pool"] for one in (*found["decoders"], *found["replicas"], *found["routers"]))
    for pool in pools:
        lines += [Text(), *_pool(pool, found, width)]
    return Text("\n").join(lines)


def _head(found: dict, width: int) -> Iterator[Text]:
    one, turns, tokens = found["deployment"], found["deployment"]["turns"], found["deployment"]["prompt_tokens"]
    up = f"   up {duration(one['up_s'])}" if one["up_s"] is not None else ""
    yield Text.assemble((one["name"], "bold"), up)
    weights = next((d["base_fingerprint"] for d in found["decoders"] if d["base_fingerprint"]), None)
    asked = tokens["cached"] + tokens["computed"]
    hits = f"{_share(one['hit_ratio'])} of {asked:,} prompt tokens were found cached" if asked else "no prompt yet"
    failed = Cell(f", {turns['failed']:,} of them with an error", "red") if turns["failed"] else Cell("")
    nodes = _nodes(found)
    on = [("node", Cell(nodes[0]))] if len(nodes) == 1 else []
    for label, *cells in (
        ("base", Cell(_end_of(one["base"], width - 13))),
        ("", Cell(one["dtype"] + (f", weights {weights[:SHORT]}" if weights else ""))),
        ("HTTP", Cell(one["http"])),
        ("gRPC", Cell(one["grpc"])),
        ("Ray", Cell(one["address"])),
        *on,
        ("turns", Cell(f"{turns['in_progress']:,} in progress, {turns['waiting']:,} waiting")),
        ("", Cell(f"{turns['ended']:,} ended"), failed),
        ("KV hits", Cell(hits)),
        ("sessions", Cell(f"{one['sessions']:,} of at most {one['max_sessions']:,}")),
    ):
        yield Text.assemble(f"{_INDENT}{label:<11}", *((cell.text, cell.style) for cell in cells))


def _pool(pool: str, found: dict, width: int) -> Iterator[Text]:
    replicas = [one for one in (*found["replicas"], *found["routers"]) if one["pool"] == pool]
    decoders = [decoder for decoder in found["decoders"] if decoder["pool"] == pool]
    usable = sum(one["usable"] for one in replicas)
    about = [f"mode {decoders[0]['sharing']}"] if decoders else []
    about.append(f"{usable} of {len(replicas)} usable")
    yield from _title(pool, ", ".join(about), "" if usable == len(replicas) and usable else "red", width)
    if decoders:
        yield from _table(("decoder", "kind", "turns", "failed", "KV hits"), (6, 12, 12, 9), map(_decoder, decoders), width)
    if replicas:
        header = ("replica", "process", "state", "up", "run", "wait", "queued", "KV", "preempted")
        header = header if any(one["stats"] for one in replicas) else header[:4]
        rows = (_replica(one, len(_nodes(found)) > 1) for one in replicas)
        yield from _table(header, (8, 10, 12, 6, 7, 7, 6, 10), rows, width)


def _title(pool: str, about: str, style: str, width: int) -> Iterator[Text]:
    if len(pool) + 3 + len(about) <= width:
        yield Text.assemble((pool, "bold"), "   ", (about, style))
        return
    yield Text(pool, "bold")
    yield Text(_INDENT + about, style)


Row = tuple[Sequence[Cell], Sequence[Cell]]


def _decoder(one: dict) -> Row:
    """Its cells, and lines below them."""
    failed = Cell(f"{one['failed']:,}", "red" if one["failed"] else "")
    hits = Cell(_share(one["hit_ratio"]) if one["hit_ratio"] is not None else "-")
    below = [Cell(f"own layers {', '.join(one['own_layers'])}")] if one["own_layers"] else []
    if one["own_tokens"] > 1:
        below.append(Cell(f"computes a prompt's last {one['own_tokens']} tokens itself"))
    return (Cell(one["decoder"]), Cell(one["kind"]), Cell(f"{one['turns']:,}"), failed, hits), below


def _replica(one: dict, with_node: bool) -> Row:
    stats, state, below = one["stats"], _state(one), []
    if one["reason"]:
        below.append(Cell(one["reason"], "red"))
    if stats and stats["stalled_s"]:
        below.append(Cell(f"no step for {duration(stats['stalled_s'])}", "red"))
    if with_node and one["node"]:
        below.append(Cell(f"on {one['node']}"))
    up = duration(one["up_s"]) if one["up_s"] is not None else ""
    cells = [Cell(one["replica"]), Cell(str(one["pid"] or "")), state, Cell(up)]
    if stats:
        held = f"{100 * stats['blocks_used'] / stats['blocks_total']:.0f} %" if stats["blocks_total"] else ""
        numbers = (stats["running"], stats["waiting"], stats["queued_tokens"])
        cells += [*map(_short, numbers), Cell(held), _short(stats["preemptions"])]
    return cells, below


def _nodes(found: dict) -> list[str]:
    return sorted({one["node"] for one in (*found["replicas"], *found["routers"]) if one["node"]})


def _state(one: dict) -> Cell:
    style = {"usable": "green", "starting": "yellow", "stopping": "yellow"}.get(one["state"], "red")
    return Cell(one["state"], style)


def _table(header: Sequence[str], widths: Sequence[int], rows: Iterable[Row], width: int) -> Iterator[Text]:
    """`widths`: of all columns but the first, with a space before each; the first gets what is left."""
    first = width - len(_INDENT) - sum(widths)
    rows = list(rows)
    first = min(first, max(map(len, (header[0], *(cells[0].text for cells, _ in rows)))))
    yield _line([Cell(name, "dim") for name in header], first, widths)
    for cells, below in rows:
        if len(cells[0].text) > first:
            yield Text(_INDENT + cells[0].text)
            cells = [Cell(""), *cells[1:]]
        yield _line(cells, first, widths)
        for cell in below:
            yield from (Text(2 * _INDENT + part, cell.style) for part in _wrapped(cell.text, width - 2 * len(_INDENT)))


def _line(cells: Sequence[Cell], first: int, widths: Sequence[int]) -> Text:
    parts = [(f"{cells[0].text:<{first}}", cells[0].style)]
    parts += [(f"{cell.text:>{width}}", cell.style) for cell, width in zip(cells[1:], widths, strict=False)]
    line = Text.assemble(_INDENT, *parts)
    line.rstrip()
    return line


def _wrapped(text: str, width: int) -> Iterator[str]:
    for line in text.splitlines():
        yield from textwrap.wrap(line, width) or [""]


def _end_of(path: str, width: int) -> str:
    return path if len(path) <= width else "…" + path[1 - width :]


def _short(number: float) -> Cell:
    """In at most six characters, like 99,999 or 123 k."""
    if number < 100_000:
        return Cell(f"{number:,}")
    size, unit = next((size, unit) for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")) if number >= size)
    return Cell(f"{number / size:.0f} {unit}")


def _share(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def duration(seconds: float) -> str:
    """In its two largest units: "3 d 4 h", "2 h 13 min", "5 min 7 s", "7 s"."""
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((number for number, (value, _) in enumerate(parts) if value), len(parts) - 1)
    return " ".join(f"{value} {unit}" for value, unit in parts[first : first + 2])
