"""``GET /v1/palette/calibration``: what stands behind the promises, and whether it still holds."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query

from server.live.monitor import ALPHA, Watched
from server.routes.basis import find_basis
from server.routes.context import InContext
from server.schemas import NamedConditions

router = APIRouter(prefix="/v1/palette", tags=["palette"])


@router.get("/calibration")
async def get_calibration(
    context: InContext, asked: Annotated[NamedConditions, Query()]
) -> dict[str, Any]:
    """Return the calibration in use, its version and age, and the drift found in each value."""
    basis, follower = find_basis(context, asked, asked.calibration), context.follower
    mode = context.settings.refresh
    if basis is None:
        return {"calibration": None, "refresh": {"mode": mode}, "drift": None}
    calibration = basis.calibration
    updated = calibration.updated or calibration.info.created
    track = None if follower is None else follower.track(calibration)
    found: dict[str, Any] = {
        "calibration": {
            "id": calibration.id,
            "version": calibration.version,
            "created": calibration.info.created.isoformat(),
            "updated": updated.isoformat(),
            "age_s": (datetime.now(UTC) - updated).total_seconds(),
            "prompts": calibration.pilot.n_prompts,
            "live_prompts": calibration.live_prompts,
            "candidates": calibration.pilot.n_candidates,
            "valid": not basis.warnings,
            "warnings": basis.warnings,
        },
        "refresh": {"mode": mode, "half_life": context.settings.refresh_half_life},
        "drift": None,
    }
    if track is not None:
        found["refresh"] |= {"requests": track.taken, "left_out": dict(track.left_out)}
        found["drift"] = {
            "alpha": ALPHA,
            "warnings": list(track.monitor.warnings),
            "values": {
                value: {
                    one.kind: _state(one) for one in track.monitor.watched if one.value == value
                }
                for value in track.monitor.values
            },
        }
    return found


def _state(one: Watched) -> dict[str, Any]:
    words = {0: "ok", 1: "above", -1: "below"}
    state = asdict(one) | {"state": words[one.direction], "since": one.since.isoformat()}
    for name in ("value", "kind", "direction"):
        del state[name]
    return state
