"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.layers import split_model
from server.routes.context import Context, InContext
from server.routes.profiles import model_names

router = APIRouter(tags=["OpenAI"])


def _model(name: str, context: Context) -> dict[str, Any]:
    base, _ = split_model(name, tuple(context.aligners))
    aligner = context.aligner_of(base)
    backend = aligner.backend
    found = {
        "id": name,
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
    """Return the models served here, alone and with each profile."""
    names = await model_names(context)
    return {"object": "list", "data": [_model(name, context) for name in names]}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, context: InContext) -> dict[str, Any]:
    """Return one model."""
    if name not in await model_names(context):
        context.aligner_of(name)  # which says what there is
    return _model(name, context)
