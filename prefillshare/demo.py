"""`prefillshare demo`: several decoders take turns over one growing context, on the embedded default.

Starts the deployment of a file, runs one session turn by turn, checks every generated token's log-probability against
the oracle (tests/reference.py), and says what the same session would have prefilled without sharing.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvshare import decoders
from kvshare.config import Deployment, load
from kvshare.errors import ConfigError, Internal, Unauthenticated
from prefillshare.app import running
from prefillshare.client import API_KEY_VARIABLE, Client, RemoteSession, TurnResult, collect
from prefillshare.progress import startup_progress
from router import tenants

CONFIG = Path("deploy/configs/demo.yaml")
MODEL = "smollm2-135m-instruct"
#: The oracle's bound.
TOLERANCE = 1e-3

BRIEF = """You are a small team that builds a booking service for a ferry line. Here is what is known.
The line runs four ferries between the mainland and three islands. A ferry carries up to 220 passengers and 40 cars.
People book on the web, at two ticket offices and by phone; today each of them keeps a list of its own, and on busy days
more tickets are sold than there are seats. The new service keeps one count of free seats and car places per departure,
holds a place for ten minutes while somebody pays, and gives it back if they do not. Tickets can be changed until one hour
before departure. Residents of the islands pay half; children under six pay nothing; a bicycle counts as a quarter of a
car place. In bad weather the line cancels departures: everybody who booked gets a message and may choose another
departure or their money back. The offices must keep working for two hours when the mainland connection is down."""

TURNS = (
    ("planner", "Name the three parts of the service that must be right first, and why."),
    ("coder", "Write a Python function that holds a place for ten minutes."),
    ("tools", "Which calls to other systems does that need? List them."),
    ("planner", "What did we forget?"),
    ("base", "Sum up what has been decided in two sentences."),
)
SUFFIX = "\nAnswer in short sentences. "


@dataclass
class Row:
    decoder: str
    prompt: list[int]
    result: TurnResult


def run(config: Path = CONFIG, max_tokens: int = 32, ca_file: Path | None = None) -> None:
    """Raises PrefillShareError; prints progress, a table, and as last line one JSON object."""
    console = Console()
    deployment = _prepare(config, console)
    names = decoders.served(deployment)
    turns = [t for t in TURNS if t[0] in names]
    if len({name for name, _ in turns}) < 2:
        raise ConfigError(f"the demo wants decoders among {', '.join(n for n, _ in TURNS)}", field="decode")
    connection = client_options(deployment, ca_file)
    with startup_progress(console) as progress, running(deployment, progress):
        progress.done()
        console.print(f"[bold]serving[/] {', '.join(names)} on one shared prefill pool")
        with Client(f"{deployment.router.host}:{deployment.router.grpc_port}", **connection) as client:
            rows = _session(client, deployment, turns, max_tokens, console)
    with console.status("checking every generated token against the reference ..."):
        worst = _oracle(deployment, rows)
    without = prefilled_without_sharing(rows, deployment.base.block_size)
    for number, row in enumerate(rows, 1):
        console.print(f"[bold]{number} {row.decoder}:[/]", Text(" ".join(row.result.text.split())))
    console.print(_table(rows))
    totals = _totals(rows, without, worst)
    console.print(
        f"prefilled [bold]{totals['computed_tokens']}[/] tokens; without sharing, each model for itself: [bold]{without}[/]. "
        f"Largest difference from the reference: {worst:.1e}"
    )
    print(json.dumps(totals))
    if worst > TOLERANCE:
        raise Internal(f"log-probabilities differ from the reference by {worst:.2e}, more than {TOLERANCE:g}")


def client_options(deployment: Deployment, ca_file: Path | None = None) -> dict[str, object]:
    """What a client of this deployment on this machine needs. Raises before engines start if it has no key, or a wrong one."""
    auth, tls = deployment.router.auth, deployment.router.tls
    if auth is not None:
        if not (key := os.environ.get(API_KEY_VARIABLE)):
            raise Unauthenticated("the deployment has tenants", field=API_KEY_VARIABLE, fix="set it to the key of one")
        tenants.load(auth).identify(key)
    return {"ca_file": ca_file or tls.cert_file} if tls is not None else {}


def _prepare(config: Path, console: Console) -> Deployment:
    """Model and seeded adapters, made if they are not there, then the deployment file."""
    from prefillshare.models import fetch
    from prefillshare.seeded_adapters import make_seeded_adapters

    if not config.is_file():
        raise ConfigError(f"no such deployment file: {config}", fix="run the demo from the project's folder, or give --config")
    if config == CONFIG:
        base = fetch(MODEL)
        with console.status("making seeded adapters ..."):
            make_seeded_adapters(base, Path("adapters/seeded"))
    return load(config)


def _session(client: Client, deployment: Deployment, turns, max_tokens: int, console: Console) -> list[Row]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(deployment.base.model)
    session = client.create_session(messages=[{"role": "system", "content": BRIEF}])
    rows = []
    for number, (decoder, question) in enumerate(turns, 1):
        title = f"turn {number} of {len(turns)}: {decoder}"
        result = _stream(session, decoder, question, max_tokens, title, console)
        kept = list(session.get(with_token_ids=True).token_ids)
        prompt = kept[: -len(result.token_ids)] + tokenizer.encode(SUFFIX, add_special_tokens=False)
        if len(prompt) != result.usage.prompt_tokens:
            raise Internal(
                f"turn {number}: the server counts {result.usage.prompt_tokens} prompt tokens, the demo {len(prompt)}"
            )
        rows.append(Row(decoder, prompt, result))
    session.delete()
    return rows


def _stream(session: RemoteSession, decoder: str, question: str, max_tokens: int, title: str, console: Console) -> TurnResult:
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        pieces = session.stream(
            decoder, messages=[{"role": "user", "content": question}], suffix_text=SUFFIX, max_tokens=max_tokens, logprobs=0
        )
        return collect(pieces, lambda text: live.update(Panel(text, title=title, title_align="left")))


def _oracle(deployment: Deployment, rows: list[Row]) -> float:
    """Largest difference of a generated token's log-probability from the reference's."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    reference = _load_reference()
    served = decoders.served(deployment)
    pools = {pool.pool: pool for pool in deployment.decode}
    base = AutoModelForCausalLM.from_pretrained(deployment.base.model, dtype=torch.float32).eval()
    worst = 0.0
    for name in dict.fromkeys(row.decoder for row in rows):
        pool = pools[served[name].pool]
        decoder = AutoModelForCausalLM.from_pretrained(pool.model or deployment.base.model, dtype=torch.float32)
        if served[name].adapter:
            decoder = PeftModel.from_pretrained(decoder, pool.adapters[name])
        function = getattr(reference, served[name].sharing)
        for row in rows:
            if row.decoder == name:
                want = function(base, decoder.eval(), row.prompt, row.result.token_ids)
                worst = max(worst, reference.max_abs_diff(row.result.logprobs, want))
    return worst


def _load_reference():
    path = Path(__file__).resolve().parents[1] / "tests" / "reference.py"
    if not path.is_file():
        raise ConfigError(f"{path} is not there", fix="run the demo from a checkout of the project")
    spec = importlib.util.spec_from_file_location("prefillshare_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prefilled_without_sharing(rows: list[Row], block_size: int) -> int:
    """Tokens prefilled if every model kept a cache of its own: per turn, the prompt minus the whole blocks that this
    model has seen before as a prefix, in an earlier prompt or response of its own."""
    seen: dict[str, list[list[int]]] = {}
    total = 0
    for row in rows:
        best = max((_common(row.prompt, old) for old in seen.get(row.decoder, [])), default=0)
        total += len(row.prompt) - min(best // block_size * block_size, len(row.prompt) - 1)
        seen.setdefault(row.decoder, []).append(row.prompt + row.result.token_ids)
    return total


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _totals(rows: list[Row], without: int, worst: float) -> dict[str, float]:
    usage = [row.result.usage for row in rows]
    cached, computed = sum(u.cached_tokens for u in usage), sum(u.computed_tokens for u in usage)
    return {
        "turns": len(rows),
        "decoders": len({row.decoder for row in rows}),
        "prompt_tokens": sum(u.prompt_tokens for u in usage),
        "cached_tokens": cached,
        "computed_tokens": computed,
        "computed_without_sharing": without,
        "hit_ratio": round(cached / (cached + computed), 4),
        "kv_bytes_transferred": sum(u.kv_bytes_transferred for u in usage),
        "completion_tokens": sum(u.completion_tokens for u in usage),
        "oracle_max_abs_diff": worst,
    }


def _table(rows: list[Row]) -> Table:
    table = Table(title="one context, several decoders")
    for header in ("turn", "decoder", "prompt", "cached", "computed", "KV moved", "TTFT", "tokens/s"):
        table.add_column(header, justify="left" if header == "decoder" else "right", no_wrap=True)
    for number, row in enumerate(rows, 1):
        u = row.result.usage
        decode_s = max(u.total_s - u.time_to_first_token_s, 1e-9)
        table.add_row(
            str(number),
            row.decoder,
            str(u.prompt_tokens),
            str(u.cached_tokens),
            str(u.computed_tokens),
            f"{u.kv_bytes_transferred / 2**20:.1f} MiB",
            f"{u.time_to_first_token_s * 1000:.0f} ms",
            f"{(u.completion_tokens - 1) / decode_s:.1f}",
        )
    return table
