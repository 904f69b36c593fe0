"""The route that describes one model, which OpenAI's API has and vLLM's server has not.

Seam: vllm/entrypoints/openai/models/{api_router,serving}.py
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from vllm.entrypoints.openai.models.api_router import models

from prefillshare.kvshare_vllm.surface.request_checks import check_served


def serve_models_one_by_one(app: FastAPI) -> None:
    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str, raw_request: Request):
        """A decoder, or the base."""
        serving = models(raw_request)
        check_served(model, serving, is_needed=True)  # a path that ends in a line break has none
        listed = (await serving.show_available_models()).data
        return next(card for card in listed if card.id == model).model_dump()
