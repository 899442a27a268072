"""``/v1/palette/...``: what values cost each other, and palettes made from that."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from server.aligning import translated
from server.calibration import Calibration
from server.promise import InfeasiblePaletteError, palette_of
from server.routes.basis import Basis, basis_of
from server.routes.context import Context, InContext, until_client_leaves
from server.schemas import (
    FrontierRequest,
    NamedConditions,
    NegotiateRequest,
    PaletteOptions,
    SpreadRequest,
)
from solver import (
    PaletteError,
    Party,
    Status,
    frontier,
    interference,
    negotiate,
    spread,
)

router = APIRouter(prefix="/v1/palette", tags=["palette"])


@router.post("/frontier")
async def trace_frontier(
    body: FrontierRequest, request: Request, context: InContext
) -> dict[str, Any]:
    """Return the trade-off curve of two values, the others held, with the price of each point."""
    options = (
        await until_client_leaves(request, context.aligner.layers.resolve(body.palette))
    ).options
    assert options is not None
    basis = basis_of(context, body, options.calibration)
    calibration = _covering(context, basis, options.candidates)
    options = translated(options, calibration, context.aligner.rewards)
    began = time.perf_counter()
    if options.scope == "answer" or options.candidates == "auto":
        msg = "a frontier is that of the traffic at one N: give `candidates` as a number, no scope"
        raise PaletteError(msg, param="candidates")
    curve = await until_client_leaves(
        request,
        asyncio.to_thread(
            frontier,
            palette_of(options),
            calibration.pilot,
            body.values,
            _count(context, calibration, options.candidates),
            n_points=body.points,
            max_kl=options.max_kl,
            senses=body.senses,
        ),
    )
    if not curve.points:
        certificate = curve.others.certificate
        reason = certificate.sentence if certificate else curve.others.status.sentence
        msg = f"The targets of the other values cannot be served: {reason.rstrip('.')}."
        raise InfeasiblePaletteError(
            msg,
            {
                "status": curve.others.status.value,
                "candidates": int(curve.candidates),
                "certificate": certificate.to_dict() if certificate else None,
            },
        )
    return _stamped(curve.to_dict(), basis, began)


@router.post("/spread")
async def spread_palettes(
    body: SpreadRequest, request: Request, context: InContext
) -> dict[str, Any]:
    """Return palettes as different from each other as can be, to be offered as profiles."""
    basis = basis_of(context, body, body.calibration)
    calibration = _covering(context, basis, body.candidates)
    began = time.perf_counter()
    found = await until_client_leaves(
        request,
        asyncio.to_thread(
            spread,
            calibration.pilot,
            body.palettes,
            _count(context, calibration, body.candidates),
            values=body.values,
            max_kl=body.max_kl,
        ),
    )
    return _stamped({"palettes": [one.to_dict() for one in found]}, basis, began)


@router.post("/negotiate")
async def negotiate_palette(
    body: NegotiateRequest, request: Request, context: InContext
) -> dict[str, Any]:
    """Return the palette that does best by the least satisfied of several parties."""
    basis = basis_of(context, body, body.calibration)
    calibration = _covering(context, basis, body.candidates)
    began = time.perf_counter()
    parties = [
        Party(
            party.name,
            palette_of(
                translated(
                    PaletteOptions(targets=party.targets, floors=party.floors),
                    calibration,
                    context.aligner.rewards,
                )
            ),
            party.weight,
        )
        for party in body.parties
    ]
    agreement = await until_client_leaves(
        request,
        asyncio.to_thread(
            negotiate,
            parties,
            calibration.pilot,
            _count(context, calibration, body.candidates),
            max_kl=body.max_kl,
        ),
    )
    if agreement.solution.status is not Status.OPTIMAL:
        msg = f"No agreement can be served. {agreement.solution.status.sentence}"
        details = {"status": agreement.solution.status.value, "certificate": None}
        raise InfeasiblePaletteError(msg, details)
    return _stamped(agreement.to_dict(), basis, began)


@router.get("/interference")
async def report_interference(
    request: Request, context: InContext, asked: Annotated[NamedConditions, Query()]
) -> dict[str, Any]:
    """Return which values pull on each other, and what that does to their multipliers."""
    basis = basis_of(context, asked, asked.calibration)
    calibration, began = _covering(context, basis, 1), time.perf_counter()
    report = await until_client_leaves(request, asyncio.to_thread(interference, calibration.pilot))
    return _stamped(report.to_dict(), basis, began)


def _covering(
    context: Context, basis: Basis, candidates: int | Literal["auto"] | None
) -> Calibration:
    """Return the version that has enough candidates."""
    calibration = basis.calibration
    if not isinstance(candidates, int):
        candidates = _default(context, calibration)
    return calibration.covering(candidates)


def _default(context: Context, calibration: Calibration) -> int:
    """Return N of a request that does not say: not more than the calibration was made with."""
    made_with = (calibration.root or calibration).pilot.n_candidates
    return min(context.aligner.promiser.default_candidates, made_with)


def _count(context: Context, calibration: Calibration, candidates: int | None) -> int:
    """Return N, or raise `PaletteError` when it is above the server's limit."""
    promiser = context.aligner.promiser
    n_candidates = _default(context, calibration) if candidates is None else candidates
    if not 1 <= n_candidates <= promiser.max_candidates:
        msg = (
            f"candidates must be from 1 to {promiser.max_candidates} (this server's limit), "
            f"not {n_candidates}"
        )
        raise PaletteError(msg, param="candidates")
    return n_candidates


def _stamped(result: dict[str, Any], basis: Basis, began: float) -> dict[str, Any]:
    spent = round(1e3 * (time.perf_counter() - began), 3)
    return {
        **result,
        "calibration": basis.calibration.id,
        "calibration_warnings": basis.warnings,
        "solve_ms": spent,
    }
