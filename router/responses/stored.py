"""What clients ask of responses that have been made."""

from __future__ import annotations

from typing import Any

from prefillshare.kvshare.caller import current_caller
from prefillshare.kvshare.errors import InvalidInput
from prefillshare.router.responses.items import page
from prefillshare.router.responses.threads import StoredResponse, Threads


class StoredResponses:
    """All methods raise PrefillShareError, and see the calling tenant's responses only."""

    def __init__(self, threads: Threads):
        self._threads = threads

    async def get(self, response_id: str, stream: bool = False) -> dict[str, Any]:
        if stream:
            raise InvalidInput("a response that has been made is not streamed again", field="stream", fix="leave it out")
        return dict((await self._stored(response_id)).body)

    async def delete(self, response_id: str) -> dict[str, Any]:
        await self._threads.forget(response_id, current_caller.get().tenant)
        return {"id": response_id, "object": "response", "deleted": True}

    async def input_items(self, response_id: str, *, after: str | None, limit: int, order: str) -> dict[str, Any]:
        return page((await self._stored(response_id)).input_items, after=after, limit=limit, order=order)

    async def cancel(self, response_id: str) -> dict[str, Any]:
        await self._stored(response_id)
        raise InvalidInput(
            "the response has been made: only one that is made in the background can be cancelled",
            field="response_id",
            fix="close the connection of a response that is being made",
        )

    async def _stored(self, response_id: str) -> StoredResponse:
        return await self._threads.response(response_id, current_caller.get().tenant, "response_id")
