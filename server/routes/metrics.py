"""``GET /metrics``: what was counted, in Prometheus' text format."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from server.routes.context import InContext

router = APIRouter(tags=["operation"])


@router.get("/metrics")
async def metrics(context: InContext) -> Response:
    """Return the metrics."""
    text = generate_latest(context.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)
