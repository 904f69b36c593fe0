"""HTTP clients that hang up at any moment, in every way in which a socket can be closed."""

from __future__ import annotations

import json
import socket
import struct
import time
from urllib.parse import urlsplit

_ASK = [{"role": "user", "content": "Tell a long story, please. " * 8}]
#: Path and body of each way to ask; each asks for `tokens` tokens.
_WAYS = (
    ("/v1/chat/completions", lambda tokens: {"messages": _ASK, "max_tokens": tokens, "ignore_eos": True}),
    ("/v1/completions", lambda tokens: {"prompt": ["One", "Two"], "n": 2, "max_tokens": tokens, "ignore_eos": True}),
    ("/v1/messages", lambda tokens: {"messages": _ASK, "max_tokens": tokens}),
    ("/v1/responses", lambda tokens: {"input": _ASK[0]["content"], "max_output_tokens": tokens}),
    ("/v1/chat/completions", lambda tokens: {"messages": _ASK, "n": 2, "max_tokens": tokens, "ignore_eos": True}),
)


def hang_up(url: str, model: str, number: int, tokens: int) -> None:
    """Client `number` of many different ones: it asks, streamed or not, and after 0 to 0.5 s closes or resets its socket."""
    path, body = _WAYS[number % len(_WAYS)]
    asked = {"model": model, "stream": number % 2 == 0, **body(tokens)}
    data, where = json.dumps(asked).encode(), urlsplit(url)
    head = f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=30) as client:
        if number % 3 == 0:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(head.encode() + data)
        if number % 4 == 0:  # streamed
            client.recv(64)
        time.sleep(number % 11 * 0.05)
