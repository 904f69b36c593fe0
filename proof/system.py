"""Stage: the whole system. Sessions go from decoder to decoder over gRPC, through router, Ray Serve and engines."""

from __future__ import annotations

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prefillshare.kvshare.config import Deployment, parse
from prefillshare.kvshare.contract import DecoderContract
from prefillshare.kvshare.modes import get_mode
from prefillshare.proof.asked import Asked, Machine
from prefillshare.proof.engines import Taken, Turn, in_words, pace
from prefillshare.proof.found import Part, Progress, Status, Tell
from prefillshare.proof.prompts import ids
from prefillshare.proof.served import compared
from prefillshare.proof.subject import ADAPTERS, BLOCK, RANK, Subject

MODE = "prefillshare"
SESSIONS, CONTEXT, GIVEN, ANSWER, MAX_TOKENS = 3, 2 * BLOCK + 5, 6, 16, 8 * BLOCK
#: Seconds for one turn.
TURN_S = 60.0


async def run(asked: Asked, tell: Tell) -> None:
    subject = Subject.of(asked, get_mode(MODE))
    if asked.base is None:
        give_tokenizer(subject.base)
    tell(Progress(0, 1, "starting Ray, a router, a prefill and a decode engine"))
    turns, kv_bytes = await asyncio.to_thread(_served, subject, asked, tell)
    tell(Progress(1, 1, "comparing"))
    tell(compared(f"system {asked.dtype}", turns, subject, asked.dtype))
    figures = {"turns": len(turns), **pace(taken for taken, _ in turns), "kv_bytes": kv_bytes}
    moved = f"{kv_bytes / 2**20:.1f} MiB of KV handed over"
    found = f"{len(turns)} turns of {SESSIONS} sessions at once: {in_words(figures)}; {moved}"
    tell(Part("system", Status.MEASURED if kv_bytes else Status.FAILED, found, figures))


def _served(subject: Subject, asked: Asked, tell: Tell) -> tuple[list[Turn], int]:
    """Start a deployment, play sessions, stop it. Returns the turns, and how many bytes of KV were handed over for them."""
    from prefillshare.app import running
    from prefillshare.client import Client

    made = deployment(subject, asked.dtype, Machine.here())
    with running(made), Client(f"127.0.0.1:{made.router.grpc_port}", timeout_s=TURN_S) as client:
        tell(Progress(0, 1, f"{SESSIONS} sessions at once"))
        with ThreadPoolExecutor(SESSIONS) as at_once:
            played = list(at_once.map(lambda number: _session(client, number), range(SESSIONS)))
    return [turn for turns, _ in played for turn in turns], sum(moved for _, moved in played)


def _session(client, number: int) -> tuple[list[Turn], int]:
    """A context that grows by what is given and what decoders answer; the base is one of them."""
    session, context, turns, kv_bytes = client.create_session(), [], [], 0
    for turn, decoder in enumerate((*ADAPTERS[number:], "base", *ADAPTERS[: number + 1])):
        given = ids(GIVEN if turn else CONTEXT, 700 + 10 * number + turn)
        context = context + given
        taken = Taken(context)
        chosen = {"max_tokens": ANSWER, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}
        for piece in session.stream(decoder, token_ids=given, **chosen):
            taken.tokens += piece.token_ids
            taken.logprobs += [row.entries[0].logprob for row in piece.logprobs]
            taken.token_s += [time.perf_counter()] * len(piece.token_ids)
            kv_bytes += piece.done.usage.kv_bytes_transferred if piece.HasField("done") else 0
        context = context + taken.tokens
        turns.append((taken, None if decoder == "base" else decoder))
    return turns, kv_bytes


def deployment(subject: Subject, dtype: str, machine: Machine) -> Deployment:
    """A prefill pool and a pool of adapters, on GPUs of their own if there are two."""
    contract = DecoderContract.of_base(subject.base, trained_with="not trained: seeded")  # reads all of the base
    for folder in subject.adapters.values():
        contract.write(folder)
    http_port, grpc_port = _free_ports(2)
    engine = {"kv_cache_gib": 1.1 * subject.kv_bytes(dtype) * 2 * len(ADAPTERS) * MAX_TOKENS / 2**30, "max_num_seqs": 16}
    if machine.is_gpu:
        import torch

        engine |= {"gpu_share": 1.0 if torch.cuda.device_count() > 1 else 0.5}
    return parse({
        "name": f"proof-{http_port}",
        "base": {"model": str(subject.base), "dtype": dtype, "max_model_len": MAX_TOKENS, "block_size": BLOCK},
        "prefill": engine,
        "decode": [{
            "pool": "agents", "sharing": MODE, "max_lora_rank": RANK, "local_prefill": "never",
            "adapters": {name: str(path) for name, path in subject.adapters.items()}, **engine,
        }],
        "router": {"http_port": http_port, "grpc_port": grpc_port},
    })  # fmt: skip


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def give_tokenizer(base: Path) -> None:
    """A router needs one. This is for random bases: every token is a word."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, PreTrainedTokenizerFast

    words = {f"w{token} ": token for token in range(AutoConfig.from_pretrained(base).vocab_size)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0 "))).save_pretrained(base)
