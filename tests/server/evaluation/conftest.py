"""Evaluation on the fake backend: prompts, and candidates collected for them."""

from __future__ import annotations

from server.backends.base import SamplingSettings
from server.evaluation.collecting import collect
from tests.server.questions import questions

N = 4


PROMPTS = questions(12)


async def collected_by(aligner, out, prompts=PROMPTS, **options):
    options = {
        "limit": None, "n_candidates": N, "sampling": SamplingSettings(), "concurrency": 3,
    } | options  # fmt: skip
    return await collect(aligner.backend, aligner.rewards, prompts, out, **options)
