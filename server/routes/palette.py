"""``/v1/palette/...``: what can be asked for, what it costs, and what texts score."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request

from rewards import Sample
from server.aligning import translated
from server.routes.basis import basis_of, find_basis
from server.routes.context import InContext, until_client_leaves
from server.schemas import NamedConditions, ScoreRequest, SolveRequest
from server.scoring import plain
from solver import PaletteError, Status, min_candidates, prices

router = APIRouter(prefix="/v1/palette", tags=["palette"])

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


@router.get("/values")
async def list_values(
    context: InContext, asked: Annotated[NamedConditions, Query()]
) -> dict[str, Any]:
    """Return the values with units and, once calibrated, the base model's levels of each."""
    suite = context.aligner.rewards
    basis = find_basis(context, asked, asked.calibration)
    values: list[dict[str, Any]] = [
        {"name": value.name, "description": value.description, "unit": value.unit}
        for value in suite.values
    ]
    if basis is None:
        return {"values": values, "calibration": None}
    calibration, pilot = basis.calibration, basis.calibration.pilot
    levels = {q: pilot.quantile(q) for q in QUANTILES}
    for i, value in enumerate(values):
        value["base"] = float(pilot.base[i])
        value["within_std"] = float(pilot.within_std[i])
        value["quantiles"] = {f"{q:g}": float(levels[q][i]) for q in QUANTILES}
        value["correlations"] = {
            name: float(pilot.correlation[i, j]) for j, name in enumerate(pilot.values) if j != i
        }
    return {
        "values": values,
        "calibration": {
            "id": calibration.id,
            "prompts": pilot.n_prompts,
            "candidates": pilot.n_candidates,
            "valid": not basis.warnings,
            "warnings": basis.warnings,
            **calibration.info.model_dump(mode="json"),
        },
    }


@router.post("/solve")
async def solve_palette(body: SolveRequest, request: Request, context: InContext) -> dict[str, Any]:
    """Return multipliers and expected levels of a palette, without generating anything."""
    aligner = context.aligner_of(body.model)
    laid = await until_client_leaves(request, aligner.layers.resolve(body.palette))
    options = laid.options
    assert options is not None
    if options.scope == "answer":
        msg = "scope `answer` is solved on the candidates of a request: there are none here"
        raise PaletteError(msg, param="scope")
    basis = basis_of(context, body, options.calibration)
    options = translated(options, basis.calibration, aligner.rewards)
    promise, calibration = await until_client_leaves(
        request, aligner.promiser.on_live(options, basis.calibration)
    )
    assert promise.solution is not None
    assert calibration is not None
    smallest = await until_client_leaves(
        request, asyncio.to_thread(min_candidates, promise.palette, calibration.pilot)
    )
    solution = promise.solution
    found = None
    if solution.status is Status.OPTIMAL:
        costs = await until_client_leaves(
            request,
            asyncio.to_thread(
                prices,
                promise.palette,
                calibration.pilot,
                promise.n_candidates,
                solution=solution,
                max_kl=options.max_kl,
            ),
        )
        found = costs.to_dict()
        del found["solution"]
    return {
        **solution.to_dict(),
        "profile": laid.profile,
        "prices": found,
        "status": promise.status if promise.repair else promise.solution.status.value,
        "repaired": promise.repair,
        "min_candidates": smallest,
        "calibration": calibration.id,
        "calibration_warnings": basis.warnings,
        "solve_ms": promise.solve_ms,
    }


@router.post("/score")
async def score_answers(body: ScoreRequest, request: Request, context: InContext) -> dict[str, Any]:
    """Return the rewards of answers that were written elsewhere.

    Values that need the sampler's own log-probabilities are left out and named in ``skipped``.
    """
    suite = context.aligner.rewards
    messages = plain([one.message() for one in body.messages])
    samples = [Sample(messages=messages, answer=answer) for answer in body.answers]
    names = suite.text_only_names
    rewards = await until_client_leaves(request, suite.score(samples, names))
    return {
        "rewards": [dict(zip(names, row, strict=True)) for row in np.asarray(rewards).tolist()],
        "skipped": [name for name in suite.names if name not in names],
    }
