"""OpenAI's client for a surface that has no port."""

from __future__ import annotations

import openai


def openai_client(http, **options) -> openai.AsyncOpenAI:
    """`http`: a client that calls the surface's app."""
    return openai.AsyncOpenAI(base_url="http://router/v1", api_key="none", http_client=http, max_retries=0, **options)
