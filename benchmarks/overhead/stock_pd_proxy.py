"""A minimal proxy that makes two vLLM servers one: prefill with max_tokens=1, then decode with the handle that it returned.

The same calls as vLLM's example tests/v1/kv_connector/nixl_integration/toy_proxy_server.py, on aiohttp, which costs less
CPU per streamed piece than the example's FastAPI and httpx. No retries, no limits, no checks.
"""

from __future__ import annotations

import argparse
import time
import uuid

import aiohttp
from aiohttp import web

ASK = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}
PREFILL_HEADER = "X-Prefill-Seconds"
_PATH = "/v1/completions"


def application(prefill_url: str, decode_url: str) -> web.Application:
    async def session(app: web.Application):
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as app["session"]:
            yield

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        client: aiohttp.ClientSession = request.app["session"]
        headers = {"X-Request-Id": uuid.uuid4().hex}
        started = time.perf_counter()
        first = {k: v for k, v in body.items() if k != "stream_options"}
        first |= {"stream": False, "max_tokens": 1, "kv_transfer_params": ASK}
        async with client.post(prefill_url + _PATH, json=first, headers=headers) as answer:
            answer.raise_for_status()
            body["kv_transfer_params"] = (await answer.json())["kv_transfer_params"]
        prefill_s = time.perf_counter() - started
        async with client.post(decode_url + _PATH, json=body, headers=headers) as answer:
            answer.raise_for_status()
            response = web.StreamResponse(headers={"Content-Type": answer.content_type, PREFILL_HEADER: f"{prefill_s:.6f}"})
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
        return response

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.cleanup_ctx.append(session)
    app.add_routes([web.post(_PATH, completions), web.get("/health", health)])
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill-url", required=True)
    parser.add_argument("--decode-url", required=True)
    given = parser.parse_args()
    app = application(given.prefill_url, given.decode_url)
    web.run_app(app, host="127.0.0.1", port=given.port, access_log=None, print=None)
