"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.routes.context import Context, InContext
from server.routes.parsing import check_model
from server.routes.profiles import model_names

router = APIRouter(tags=["OpenAI"])


def _model(context: Context, name: str) -> dict[str, Any]:
    backend = context.aligner.backend
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "palette",
        "max_model_len": backend.max_context,
    }


@router.get("/v1/models")
async def list_models(context: InContext) -> dict[str, Any]:
    """Return the models served here, alone and with each profile."""
    names = await model_names(context)
    return {"object": "list", "data": [_model(context, name) for name in names]}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, context: InContext) -> dict[str, Any]:
    """Return one model."""
    if name not in await model_names(context):
        check_model(name, context)
    return _model(context, name)
