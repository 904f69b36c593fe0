"""What a client of the campaign asks over HTTP: OpenAI's completions, chat completions and responses, and Anthropic's messages,
in one piece and streamed."""

from __future__ import annotations

import json
import random

import httpx

from benchmarks.soak.findings import Findings
from benchmarks.soak.system import OWN_LAYERS
from benchmarks.soak.truth import Truth, compare
from prefillshare.kvshare.errors import UNFORESEEN

TIMEOUT_S = 150.0
#: Answers that a client may get while everything fails.
MAY_FAIL = (429, 502, 503, 504)
#: What Serve's proxy says where a router died before it had begun to answer.
OF_THE_PROXY = "Internal Server Error"
WORDS = ("ferry", "noon", "wind", "tide", "allow", "crew", "had", "tea", "before", "it", "leaves", "again")


class Refused(Exception):
    """The server, or a broken connection, has refused it; its text says how."""


class HttpAgent:
    """Makes a connection for each request, so that any proxy may take it."""

    def __init__(self, url: str, rng: random.Random, truth: Truth, found: Findings):
        self._url, self._rng, self._truth, self._found = url, rng, truth, found

    def ask(self, decoder: str, prompt: list[int], sampling: dict) -> None:
        """Raises Refused."""
        way = self._rng.choices((self._completion, self._chat, self._responses, self._messages), (5, 4, 2, 2))[0]
        way(decoder, prompt, sampling)

    def _completion(self, decoder: str, prompt: list[int], sampling: dict) -> None:
        body = {"model": decoder, "prompt": prompt, "logprobs": 0, "return_token_ids": True, **sampling}
        if self._rng.random() < 0.5:
            answer = self._post("/v1/completions", body)
            choice = answer["choices"][0]
            tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        else:
            answer, tokens, logprobs = {}, [], []
            for event in self._stream("/v1/completions", body):
                answer |= {key: value for key, value in event.items() if value is not None}
                for choice in event["choices"]:
                    tokens += choice["token_ids"] or []
                    logprobs += (choice["logprobs"] or {"token_logprobs": []})["token_logprobs"]
        self._compare(decoder, prompt, tokens, logprobs, sampling, answer)

    def _chat(self, decoder: str, prompt: list[int], sampling: dict) -> None:
        body = {"model": decoder, "messages": self._said(), "logprobs": True, "return_token_ids": True, **sampling}
        answer = self._post("/v1/chat/completions", body)
        choice = answer["choices"][0]
        logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
        self._compare(decoder, answer["prompt_token_ids"], choice["token_ids"], logprobs, sampling, answer)

    def _responses(self, decoder: str, prompt: list[int], sampling: dict) -> None:
        """A second response goes on from the first, and both are deleted."""
        asked = {"model": decoder, "input": self._said()[0]["content"], "temperature": 0, "max_output_tokens": 12}
        first = self._post("/v1/responses", asked)
        if not first["store"]:  # Redis was away, and the answer says so
            raise Refused("not stored")
        second = self._post("/v1/responses", asked | {"previous_response_id": first["id"]})
        self._found.add(turns=1)
        for answer in (first, second):
            if answer["status"] not in ("completed", "incomplete"):
                self._found.tell("lost", f"a response of {decoder} is {answer['status']}")
            self._send("DELETE", f"/v1/responses/{answer['id']}")

    def _messages(self, decoder: str, prompt: list[int], sampling: dict) -> None:
        body = {"model": decoder, "messages": self._said(), "max_tokens": 12, "temperature": 0}
        if self._rng.random() < 0.5:
            usage = self._post("/v1/messages", body)["usage"]
        else:
            usage = {}
            for event in self._stream("/v1/messages", body):
                usage |= event.get("usage") or {}
        if not 0 < usage.get("output_tokens", 0) <= 12:
            self._found.tell("wrong", f"a message of {decoder} has the usage {usage}")

    def _compare(
        self, decoder: str, prompt: list[int], tokens: list[int], logprobs: list[float], sampling: dict, answer: dict
    ) -> None:
        usage = (answer.get("kv_transfer_params") or {}).get("prefillshare") or {}
        layers = usage.get("own_layers") or OWN_LAYERS.get(decoder, "")
        compare(self._truth, self._found, decoder, prompt, tokens, logprobs, sampling, layers, " (over HTTP)")

    def _said(self) -> list[dict]:
        return [{"role": "user", "content": " ".join(self._rng.choices(WORDS, k=self._rng.randint(3, 60)))}]

    def _post(self, path: str, body: dict) -> dict:
        return self._send("POST", path, json=body).json()

    def _send(self, method: str, path: str, **what) -> httpx.Response:
        try:
            answer = httpx.request(method, self._url + path, timeout=TIMEOUT_S, trust_env=False, **what)
        except httpx.TimeoutException as error:
            self._found.tell("hung", f"{method} {path} has not been answered after {TIMEOUT_S:g} s")
            raise Refused("no answer") from error
        except httpx.HTTPError as error:
            raise Refused("connection broken") from error
        if answer.status_code in MAY_FAIL or answer.text == OF_THE_PROXY:
            raise Refused(f"HTTP {answer.status_code}")
        if answer.is_error:
            raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer

    def _stream(self, path: str, body: dict) -> list[dict]:
        """The events of a stream that has ended well."""
        lines = self._send("POST", path, json=body | {"stream": True}).text.splitlines()
        data = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
        events = [json.loads(one) for one in data if one != "[DONE]"]
        if not events:
            raise Refused("stream broken off")
        if "error" in events[-1]:
            error = events[-1]["error"]
            if error.get("code", 503) not in MAY_FAIL or UNFORESEEN in error["message"]:
                raise RuntimeError(f"{path}, streamed: {error}")
            raise Refused("stream ended in an error")
        if not (data[-1] == "[DONE]" or events[-1].get("type") == "message_stop"):
            raise Refused("stream broken off")
        return events
