"""Surfaces without a port while a module's tests run, and clients for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anthropic
import httpx2
import openai

from benchmarks.chats.surface import ChatSurface


@asynccontextmanager
async def started(surface: ChatSurface) -> AsyncIterator[ChatSurface]:
    await surface.start()
    yield surface
    await surface.stop()


@asynccontextmanager
async def with_openai(surface: ChatSurface) -> AsyncIterator[ChatSurface]:
    """The started surface; `client` is OpenAI's."""
    async with started(surface):
        surface.client = openai_client(surface.http)
        yield surface


@asynccontextmanager
async def with_anthropic(surface: ChatSurface) -> AsyncIterator[ChatSurface]:
    """The started surface; `client` is Anthropic's."""
    async with started(surface):
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(surface.app), base_url="http://router")
        surface.client = anthropic.AsyncAnthropic(base_url="http://router", api_key="none", http_client=http, max_retries=0)
        yield surface
        await http.aclose()


def openai_client(http, **options) -> openai.AsyncOpenAI:
    """`http`: a client that calls the surface's app."""
    return openai.AsyncOpenAI(base_url="http://router/v1", api_key="none", http_client=http, max_retries=0, **options)
