"""``GET /v1/palette/calibrations``: what palettes can be solved on here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.calibration import Calibration
from server.routes.context import InContext

router = APIRouter(prefix="/v1/palette", tags=["palette"])


@router.get("/calibrations")
async def list_calibrations(context: InContext, model: str | None = None) -> dict[str, Any]:
    """Return the calibrations of a model, and which one a plain request gets."""
    shelf = context.aligner_of(model).shelf
    default = shelf.default
    return {
        "calibrations": [
            {
                **summary(one.calibration),
                "source": one.source,
                "file": None if one.path is None else one.path.name,
                "default": default is not None and one.calibration.id == default.id,
            }
            for one in shelf.held
        ],
        # Not why: the reason has the path of the folder in it.
        "damaged": [one.path.name for one in shelf.damaged],
    }


def summary(calibration: Calibration) -> dict[str, Any]:
    """Return what a calibration is and what it covers, JSON-able."""
    pilot = calibration.pilot
    return {
        "id": calibration.id,
        "values": list(pilot.values),
        "prompts": pilot.n_prompts,
        "candidates": pilot.n_candidates,
        **calibration.info.model_dump(mode="json"),
    }
