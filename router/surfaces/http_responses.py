"""Routes of stored responses and of conversations, beside the one that makes responses (OpenAI's API)."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI

from prefillshare.kvshare.errors import PrefillShareError
from prefillshare.kvshare_vllm.surface.http_refusals import to_vllm
from prefillshare.router.responses.conversations import Conversations
from prefillshare.router.responses.items import USUAL_PER_PAGE
from prefillshare.router.responses.stored import StoredResponses

Given = Annotated[dict[str, Any], Body()]


def add_routes(app: FastAPI, responses: StoredResponses, conversations: Conversations) -> None:
    routes = APIRouter()
    one, its_items = "/v1/conversations/{conversation_id}", "/v1/conversations/{conversation_id}/items"

    @routes.get("/v1/responses/{response_id}")
    async def retrieve_response(response_id: str, stream: bool = False):
        """A response that has been stored."""
        return await _answered(responses.get(response_id, stream))

    @routes.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str):
        """Forget a response."""
        return await _answered(responses.delete(response_id))

    @routes.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(
        response_id: str, after: str | None = None, limit: int = USUAL_PER_PAGE, order: str = "desc"
    ):
        """What a response was asked."""
        return await _answered(responses.input_items(response_id, after=after, limit=limit, order=order))

    @routes.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(response_id: str):
        """Refused: no response is made in the background."""
        return await _answered(responses.cancel(response_id))

    @routes.post("/v1/conversations")
    async def create_conversation(given: Annotated[dict[str, Any] | None, Body()] = None):
        """Begin a conversation, with items or without."""
        given = given or {}
        return await _answered(conversations.create(given.get("items"), given.get("metadata")))

    @routes.get(one)
    async def retrieve_conversation(conversation_id: str):
        """A conversation's metadata."""
        return await _answered(conversations.get(conversation_id))

    @routes.post(one)
    async def update_conversation(conversation_id: str, given: Given):
        """Change a conversation's metadata."""
        return await _answered(conversations.update(conversation_id, given))

    @routes.delete(one)
    async def delete_conversation(conversation_id: str):
        """Forget a conversation and all that was said in it."""
        return await _answered(conversations.delete(conversation_id))

    @routes.post(its_items)
    async def add_items(conversation_id: str, given: Given):
        """Add items at the end of a conversation."""
        return await _answered(conversations.add(conversation_id, given.get("items")))

    @routes.get(its_items)
    async def list_items(
        conversation_id: str, after: str | None = None, limit: int = USUAL_PER_PAGE, order: str = "desc"
    ):
        """What was said in a conversation, page by page."""
        return await _answered(conversations.items(conversation_id, after=after, limit=limit, order=order))

    @routes.get(its_items + "/{item_id}")
    async def retrieve_item(conversation_id: str, item_id: str):
        """An item of a conversation."""
        return await _answered(conversations.item(conversation_id, item_id))

    @routes.delete(its_items + "/{item_id}")
    async def take_item_out(conversation_id: str, item_id: str):
        """Take an item out of a conversation."""
        return await _answered(conversations.take_out(conversation_id, item_id))

    app.include_router(routes)


async def _answered(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except PrefillShareError as error:
        raise to_vllm(error) from error
