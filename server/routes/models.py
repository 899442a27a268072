"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.alignment import Aligner
from server.routes.context import Context, InContext

router = APIRouter(tags=["OpenAI"])


def _model(aligner: Aligner, context: Context) -> dict[str, Any]:
    backend = aligner.backend
    found = {
        "id": backend.model_id,
        "object": "model",
        "created": context.created,
        "owned_by": "palette",
        "max_model_len": backend.max_context,
    }
    if aligner is not context.aligner:
        # As vLLM tells an adapter from a model.
        found["parent"] = context.aligner.backend.model_id
    return found


@router.get("/v1/models")
async def list_models(context: InContext) -> dict[str, Any]:
    """Return the models served here."""
    found = [_model(aligner, context) for aligner in context.aligners.values()]
    return {"object": "list", "data": found}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, context: InContext) -> dict[str, Any]:
    """Return one model."""
    return _model(context.aligner_of(name), context)
