"""How the client of benchmarks.overhead speaks to each system: greedy, a fixed number of tokens, token ids in."""

from __future__ import annotations

import json
import uuid

import aiohttp
import grpc

from benchmarks.overhead.stock_pd_proxy import PREFILL_HEADER
from benchmarks.shared.load import TURN_TIMEOUT_S, Surface
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2 as pb
from prefillshare.protos.prefillshare.v1 import prefillshare_pb2_grpc as pb_grpc


class Bare(Surface):
    """vLLM's AsyncLLM in this process."""

    def __init__(self, llm):
        self._llm = llm

    async def turn(self, prompt, output_tokens, details):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        async for output in self._llm.generate({"prompt_token_ids": prompt}, sampling, uuid.uuid4().hex):
            yield len(output.outputs[0].token_ids)


class Http(Surface):
    """OpenAI completions, streamed. Pieces are counted by the usage every one of them carries."""

    def __init__(self, url: str, model: str):
        self._url, self._model = f"{url}/v1/completions", model
        self._client: aiohttp.ClientSession | None = None

    async def prepare(self, turns):
        if self._client is None:
            timeout = aiohttp.ClientTimeout(total=TURN_TIMEOUT_S)
            self._client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    async def turn(self, prompt, output_tokens, details):
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        seen = 0
        async with self._client.post(self._url, json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"{self._url} answered {answer.status}: {await answer.text()}")
            if seconds := answer.headers.get(PREFILL_HEADER):
                details["prefill_s"] = float(seconds)
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                piece = json.loads(line[6:])
                if "error" in piece:
                    raise RuntimeError(f"{self._url} broke off: {piece['error']}")
                total = piece["usage"]["completion_tokens"]
                yield total - seen
                seen = total

    async def close(self):
        if self._client is not None:
            await self._client.close()


class Grpc(Surface):
    """Our gRPC surface, one session per turn. Sessions are made before and deleted after the measured time."""

    def __init__(self, address: str, decoder: str):
        self._address, self._decoder = address, decoder
        self._channel = self._stub = None
        self._made: list[str] = []
        self._free: list[str] = []

    async def prepare(self, turns):
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address)
            self._stub = pb_grpc.PrefillShareStub(self._channel)
        for _ in range(turns):
            session = await self._stub.CreateSession(pb.CreateSessionRequest(), timeout=TURN_TIMEOUT_S)
            self._made.append(session.session_id)
        self._free = list(self._made)

    async def turn(self, prompt, output_tokens, details):
        request = pb.GenerateRequest(
            session_id=self._free.pop(), decoder=self._decoder, input=pb.Input(token_ids=pb.TokenIds(ids=prompt)),
            sampling=pb.SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True),
        )
        async for piece in self._stub.Generate(request, timeout=TURN_TIMEOUT_S):
            yield len(piece.token_ids)
            if piece.HasField("done"):
                usage = piece.done.usage
                if usage.cached_tokens or usage.resumes:
                    raise RuntimeError(f"{usage.cached_tokens} tokens were cached, {usage.resumes} resumes: not comparable")
                details |= {"router_ttft_s": usage.time_to_first_token_s, "prefill_s": usage.prefill_s}

    async def finish(self):
        for session in self._made:
            await self._stub.DeleteSession(pb.DeleteSessionRequest(session_id=session), timeout=TURN_TIMEOUT_S)
        self._made = []

    async def close(self):
        if self._channel is not None:
            await self._channel.close()
