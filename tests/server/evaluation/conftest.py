"""An aligner on the fake backend, and prompts to evaluate it on."""

from __future__ import annotations

import asyncio

import pytest

from rewards import Message
from server.backends.base import SamplingSettings
from server.evaluation.collecting import collect
from tests.server.conftest import run_fake
from tests.server.fakes import FakeBackend

N = 4


def prompts_of(*texts):
    return [(Message(role="user", content=text),) for text in texts]


PROMPTS = prompts_of(*(f"Question {i}" for i in range(12)))


class Slow(FakeBackend):
    """Gives the loop a turn before every candidate: a run can be stopped between any two."""

    async def generate(self, *arguments, **options):
        async for candidate in super().generate(*arguments, **options):
            await asyncio.sleep(0)
            yield candidate


@pytest.fixture
async def aligner(tmp_path, settings):
    async with run_fake(tmp_path, settings, Slow()) as running:
        yield running.context.aligner


async def collected_by(aligner, out, prompts=PROMPTS, **options):
    options = {
        "limit": None, "n_candidates": N, "sampling": SamplingSettings(), "concurrency": 3,
    } | options  # fmt: skip
    return await collect(aligner.backend, aligner.rewards, prompts, out, **options)
