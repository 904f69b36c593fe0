"""`prefillshare demo`: trained decoders take turns over one growing context, by default with the embedded model.

Starts the deployment of a file, runs one session turn by turn, asks the base the same on forks of the session, checks every
generated token's log-probability against the oracle (reference.py), and reports how much the same session would have
prefilled without sharing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from prefillshare.app import running
from prefillshare.client import API_KEY_VARIABLE, Client, RemoteSession, TurnResult, collect
from prefillshare.kvshare import addresses, decoders
from prefillshare.kvshare.config import Deployment, load
from prefillshare.kvshare.errors import ConfigError, Internal, Unauthenticated
from prefillshare.progress import startup_progress
from prefillshare.router import tenants

CONFIG = Path("deploy/configs/demo.yaml")
MODEL = "smollm2-135m-instruct"
#: Largest allowed difference from the oracle's log-probabilities.
TOLERANCE = 1e-3

BRIEF = """You are a small team that runs the booking service of a ferry line. Here is what is known.
The line runs four ferries between the mainland and three islands. A ferry carries up to 220 passengers and 40 cars.
People book on the web, at two ticket offices and by phone. The service keeps one count of free seats and car places per
departure, holds a place for ten minutes while somebody pays, and gives it back if they do not. Tickets can be changed until
one hour before departure. Residents of the islands pay half; children under six pay nothing; a bicycle counts as a quarter
of a car place. In bad weather the line cancels departures: everybody who booked gets a message and may choose another
departure or their money back."""

#: The instructions that the adapters in adapters/ were trained with (finetuning/tasks).
SOLVE = "Solve the problem step by step. End with #### and the result."
CALL = """You answer with one call of a function. The functions:
<tools>
{tools}
</tools>
Answer with its name and arguments, like
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": VALUE}}}}
</tool_call>"""


def _tool(name: str, description: str, **parameters: str) -> dict:
    """`parameters`: name -> "type, description"."""
    properties = {key: dict(zip(("type", "description"), what.split(", ", 1), strict=True)) for key, what in parameters.items()}
    wanted = {"type": "dict", "properties": properties, "required": list(parameters)}
    return {"name": name, "description": description, "parameters": wanted}


BOOK = _tool("book_ticket", "Book a ferry ticket.", origin="string, Port where it begins.",
             destination="string, Port where it ends.", passengers="integer, How many passengers.")  # fmt: skip
CANCEL = _tool("cancel_departure", "Cancel a departure.", ferry="string, Name of the ferry.", date="string, As YYYY-MM-DD.")


@dataclass(frozen=True)
class Turn:
    """`wanted`: what a right answer contains, a number or a call; None: any answer will do."""

    decoder: str
    question: str
    instruction: str | None = None
    wanted: float | dict | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        before = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return [*before, {"role": "user", "content": self.question}]

    def is_right(self, answer: str) -> bool:
        """Whether the last number, or the first call, in the answer is the wanted one."""
        return self.wanted == (_call(answer) if isinstance(self.wanted, dict) else _number(answer))


def _solve(question: str, result: float) -> Turn:
    return Turn("arithmetic", question, SOLVE, result)


def _use(tool: dict, question: str, **arguments) -> Turn:
    return Turn("tools", question, CALL.format(tools=json.dumps(tool)), {"name": tool["name"], "arguments": arguments})


TURNS = (
    _solve("A girl has 9 tickets. Her brother has 5 fewer tickets than she has. How many tickets do they have together? "
           "Give the result as your final answer. Do not include units.", 13),
    _use(BOOK, "Book a ticket from Ullapool to Stornoway for 3 passengers.",
         origin="Ullapool", destination="Stornoway", passengers=3),
    _solve("A ferry carried half as many cars as bicycles. If there were 200 bicycles, calculate the total number of "
           "vehicles on the ferry. Give the result as your final answer. Do not include units.", 300),
    _use(CANCEL, "Cancel the departure of the ferry Skua on 2026-05-03.", ferry="Skua", date="2026-05-03"),
    Turn("base", "Say in one sentence what this team does."),
)  # fmt: skip


def _number(answer: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
    return float(found[-1].replace(",", "")) if found else None


def _call(answer: str) -> dict | None:
    try:
        call, _ = json.JSONDecoder().raw_decode(answer[answer.index("{") :])
    except ValueError:
        return None
    return call if isinstance(call, dict) else None


@dataclass
class Row:
    """`base_text`: what the base says instead, for turns that have a right answer."""

    turn: Turn
    prompt: list[int]
    result: TurnResult
    base_text: str | None = None

    @property
    def decoder(self) -> str:
        return self.turn.decoder


def run(config: Path = CONFIG, max_tokens: int = 128, ca_file: Path | None = None) -> None:
    """Prints progress, a table, and as last line one JSON object. Raises PrefillShareError."""
    console = Console()
    deployment = _prepare(config, console)
    names = decoders.served(deployment)
    turns = [turn for turn in TURNS if turn.decoder in names]
    if len({turn.decoder for turn in turns}) < 2:
        wanted = ", ".join(dict.fromkeys(turn.decoder for turn in TURNS))
        raise ConfigError(f"the demo needs at least two of the decoders {wanted}", field="decode")
    connection = client_options(deployment, ca_file)
    with startup_progress(console) as progress, running(deployment, progress):
        progress.done()
        where = "on one shared prefill pool" if deployment.shared_prefill else "without a prefill pool"
        console.print(f"[bold]serving[/] {', '.join(names)} {where}")
        with Client(addresses.joined(deployment.router.host, deployment.router.grpc_port), **connection) as client:
            rows = _session(client, turns, "base" in names, max_tokens, console)
    with _busy("checking every generated token against the reference; each model computes its turns anew ...", console):
        worst = _oracle(deployment, rows)
    without = prefilled_without_sharing(rows, deployment.base.block_size)
    for number, row in enumerate(rows, 1):
        _show(number, row, console)
    console.print(_table(rows))
    totals = _totals(rows, without, worst)
    console.print(
        f"prefilled [bold]{totals['computed_tokens']}[/] tokens; without sharing, the models would have prefilled "
        f"[bold]{without}[/]. Largest difference from the reference: {worst:.1e}"
    )
    print(json.dumps(totals))
    if worst > TOLERANCE:
        raise Internal(f"log-probabilities differ from the reference by {worst:.2e}, more than {TOLERANCE:g}")


def client_options(deployment: Deployment, ca_file: Path | None = None) -> dict[str, object]:
    """What a client of this deployment on this machine needs. Raises before engines start if it has no key, or a wrong one."""
    auth, tls = deployment.router.auth, deployment.router.tls
    if auth is not None:
        if not (key := os.environ.get(API_KEY_VARIABLE)):
            raise Unauthenticated("the deployment has tenants", field=API_KEY_VARIABLE, fix="set it to a tenant's key")
        tenants.load(auth).identify(key)
    return {"ca_file": ca_file or tls.cert_file} if tls is not None else {}


@contextmanager
def _busy(what: str, console: Console) -> Iterator[None]:
    """Say what is being done, even if the output is no terminal."""
    if not console.is_terminal:
        console.print(what)
    with console.status(what):
        yield


def _prepare(config: Path, console: Console) -> Deployment:
    """Make the default model's folder if it is not there, then load the deployment file."""
    from prefillshare.models import fetch

    if not config.is_file():
        raise ConfigError(f"no such deployment file: {config}", fix="run the demo from the project's folder, or give --config")
    if config == CONFIG:
        fetch(MODEL)
    return load(config)


def _session(client: Client, turns: list[Turn], with_base: bool, max_tokens: int, console: Console) -> list[Row]:
    """Run the turns on one session; then, if the base is served, ask it the same questions."""
    session = client.create_session(messages=[{"role": "system", "content": BRIEF}])
    rows, forks = [], []
    for number, turn in enumerate(turns, 1):
        forks.append(session.fork())
        title = f"turn {number} of {len(turns)}: {turn.decoder}"
        result = _stream(session, turn, max_tokens, title, console)
        prompt = list(session.get(with_token_ids=True).token_ids)[: -len(result.token_ids)]
        if len(prompt) != result.usage.prompt_tokens:
            raise Internal(
                f"turn {number}: the server counts {result.usage.prompt_tokens} prompt tokens, the demo {len(prompt)}"
            )
        rows.append(Row(turn, prompt, result))

    def base_says(row: Row, fork: RemoteSession) -> None:
        if with_base and row.turn.wanted is not None:
            row.base_text = fork.turn("base", messages=row.turn.messages, max_tokens=max_tokens, temperature=0.0).text
        fork.delete()

    with _busy("asking the base the same ...", console), ThreadPoolExecutor(len(rows)) as pool:
        list(pool.map(base_says, rows, forks))
    session.delete()
    return rows


def _stream(session: RemoteSession, turn: Turn, max_tokens: int, title: str, console: Console) -> TurnResult:
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        pieces = session.stream(turn.decoder, messages=turn.messages, max_tokens=max_tokens, temperature=0.0, logprobs=0)
        return collect(pieces, lambda text: live.update(Panel(text, title=title, title_align="left")))


def _show(number: int, row: Row, console: Console) -> None:
    def line(who: str, text: str) -> None:
        mark = "" if row.turn.wanted is None else " [green]right[/]" if row.turn.is_right(text) else " [red]wrong[/]"
        console.print(f"[bold]{who}[/]{mark}:", Text(" ".join(text.split())))

    console.print(f"[bold]{number}[/]", Text(row.turn.question, style="italic"))
    line(f"  {row.decoder}", row.result.text)
    if row.base_text is not None:
        line("  base instead", row.base_text)


def _oracle(deployment: Deployment, rows: list[Row]) -> float:
    """Largest difference of a generated token's log-probability from the reference's."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from prefillshare import reference

    transformers_logging.disable_progress_bar()
    served = decoders.served(deployment)
    pools = {pool.pool: pool for pool in deployment.decode}
    base = AutoModelForCausalLM.from_pretrained(deployment.base.model, dtype=torch.float32).eval()
    worst = 0.0
    for name in dict.fromkeys(row.decoder for row in rows):
        pool = pools[served[name].pool]
        decoder = AutoModelForCausalLM.from_pretrained(pool.model or deployment.base.model, dtype=torch.float32)
        if served[name].adapter:
            decoder = PeftModel.from_pretrained(decoder, pool.adapters[name])
        function = reference.of(served[name])
        for row in rows:
            if row.decoder == name:
                want = function(base, decoder.eval(), row.prompt, row.result.token_ids)
                worst = max(worst, reference.max_abs_diff(row.result.logprobs, want))
    return worst


def prefilled_without_sharing(rows: list[Row], block_size: int) -> int:
    """Tokens that would be prefilled if every model kept its own cache: per turn, the prompt minus the full blocks at its
    beginning that this model has seen in an earlier prompt or response of its own."""
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
    usage, checked = [row.result.usage for row in rows], [row for row in rows if row.turn.wanted is not None]
    asked = [row for row in checked if row.base_text is not None]
    cached, computed = sum(u.cached_tokens for u in usage), sum(u.computed_tokens for u in usage)
    return {
        "turns": len(rows),
        "decoders": len({row.decoder for row in rows}),
        "answers_checked": len(checked),
        "right_of_specialists": sum(row.turn.is_right(row.result.text) for row in checked),
        "right_of_base": sum(row.turn.is_right(row.base_text) for row in asked) if asked else None,
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
    for header in ("turn", "decoder", "prompt", "cached", "computed", "KV MiB", "TTFT ms", "tok/s"):
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
            f"{u.kv_bytes_transferred / 2**20:.1f}",
            f"{u.time_to_first_token_s * 1000:.0f}",
            f"{(u.completion_tokens - 1) / decode_s:.1f}",
        )
    return table
