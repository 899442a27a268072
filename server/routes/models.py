"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.routes.context import Context, InContext
from server.routes.parsing import check_model

router = APIRouter(tags=["OpenAI"])


def _model(context: Context) -> dict[str, Any]:
    backend = context.aligner.backend
    return {
        "id": backend.model_id,
        "object": "model",
        "created": context.created,
        "owned_by": "palette",
        "max_model_len": backend.max_context,
    }


@router.get("/v1/models")
async def list_models(context: InContext) -> dict[str, Any]:
    """Return the models served here."""
    return {"object": "list", "data": [_model(context)]}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, context: InContext) -> dict[str, Any]:
    """Return one model."""
    check_model(name, context)
    return _model(context)
