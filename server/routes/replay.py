"""``POST /v1/palette/replay``: an earlier answer's candidates under another palette."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request

from server.aligning import translated
from server.replay import Entry, Replayed, replay
from server.reporting import Outcome, calibration_report, choice_report
from server.routes.context import InContext, until_client_leaves
from server.schemas import ReplayedCandidate, ReplayReport, ReplayRequest

router = APIRouter(prefix="/v1/palette", tags=["palette"])


@router.post("/replay")
async def replay_answer(body: ReplayRequest, request: Request, context: InContext) -> ReplayReport:
    """Return what another palette would have chosen; nothing is generated or scored."""
    entry = context.replays.find(body.id, body.index)
    aligner = context.aligner_of(entry.model)
    laid = await until_client_leaves(request, aligner.layers.resolve(body.palette))
    options = laid.options
    assert options is not None
    options = translated(options, entry.group.calibration, aligner.rewards)
    found = await until_client_leaves(request, replay(entry, options, aligner.promiser))
    calibration = calibration_report(
        entry.group.calibration, options.scope, entry.uncovered, found.found
    )
    names = aligner.promiser.values
    lost = dict.fromkeys(entry.group.lost(names), "it could not be scored for this answer")
    outcome = Outcome([], entry.group.known, found.log_weights, found.picks, left_out=lost)
    return ReplayReport(
        **choice_report(options, found.promise, outcome, names, calibration, laid.profile),
        id=body.id,
        index=body.index,
        model=entry.model,
        chosen=[entry.indices[i] for i in found.picks],
        served=[entry.indices[i] for i in entry.picks],
        candidates_detail=_details(entry, found, names),
        solve_ms=found.promise.solve_ms,
    )


def _details(entry: Entry, found: Replayed, names: Sequence[str]) -> list[ReplayedCandidate]:
    weights = np.exp(found.log_weights).tolist()
    rewards = entry.group.rewards.tolist()
    return [
        ReplayedCandidate(
            index=index,
            rewards={
                name: reward
                for name, reward in zip(names, rewards[i], strict=True)
                if not math.isnan(reward)
            },
            weight=weights[i],
            chosen=i in found.picks,
            served=i in entry.picks,
            text=entry.texts[i] if entry.texts is not None else None,
        )
        for i, index in enumerate(entry.indices)
    ]
