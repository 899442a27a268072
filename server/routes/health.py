"""Liveness, readiness and versions."""

from __future__ import annotations

from dataclasses import asdict

import fastapi
import numpy
import scipy
from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.routes.context import InContext
from server.version import VERSION

router = APIRouter(tags=["operation"])


@router.get("/health")
async def health() -> dict[str, str]:
    """Return at once: the process lives and its event loop turns."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(context: InContext) -> JSONResponse:
    """Return 200 when requests can be served, 503 with the reason when they cannot.

    A scorer's failure counts once a trial after it has failed as well: what one text made fail is
    no reason to send the others elsewhere.
    """
    aligner, drain = context.aligner, context.drain
    backend, rewards = aligner.backend.health(), aligner.rewards.health()
    is_ready = backend["state"] == "ok" and all(
        scorer["state"] == "ok" or not scorer["persists"] for scorer in rewards.values()
    )
    calibrations = {
        name: {
            "id": one.calibration.id if one.calibration is not None else None,
            "background": asdict(context.progress[name]),
        }
        for name, one in context.aligners.items()
    }
    status = "draining" if drain.is_draining else "ready" if is_ready else "not ready"
    body = {
        "status": status,
        "backend": backend,
        "rewards": rewards,
        "calibration": calibrations.pop(aligner.backend.model_id),
        "adapter_calibrations": calibrations,
        "running": aligner.admission.n_running,
        "waiting": aligner.admission.n_waiting,
    }
    return JSONResponse(body, 200 if status == "ready" else 503)


@router.get("/version")
async def version(context: InContext) -> dict[str, str]:
    """Return the versions that make up an answer."""
    backend = context.aligner.backend
    return {
        "version": VERSION,
        "model": backend.model_id,
        "model_fingerprint": backend.fingerprint,
        "rewards_fingerprint": context.aligner.rewards.fingerprint,
        "fastapi": fastapi.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }
