"""The measurement of the server's own stages: what it counts, and what it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rewards import Message
from server.app import running_aligner
from server.bench import STAGES, measure, print_bench
from server.cli import app
from server.schemas import PaletteOptions
from solver import PaletteError
from tests.server.conftest import fake_calibration
from tests.server.fakes import FakeBackend, lexical_rewards

PROMPTS = [(Message(role="user", content=f"Question {i}"),) for i in range(3)]


async def measured(tmp_path, settings, palette=None, **options):
    """Return the backend, what was seen of progress, and the figures."""
    backend, seen, calls = FakeBackend(), [], []
    options = {"n_candidates": 4, "n_clients": 2, "n_requests": 5} | options
    async with running_aligner(
        settings, backend=backend, rewards=lexical_rewards(tmp_path), observers=[seen.append]
    ) as aligner:
        aligner.calibration = fake_calibration()
        found = await measure(
            aligner, PROMPTS, palette or PaletteOptions(), seen, settings,
            progress=lambda *call: calls.append(call), **options,
        )  # fmt: skip
    return backend, calls, found


async def test_both_kinds_get_the_same_prompts_seeds_and_tokens(tmp_path, settings):
    backend, calls, found = await measured(tmp_path, settings)
    # Five requests of two clients are three rounds, and one to warm up, of each kind.
    assert len(backend.asked) == 2 * (3 + 1) * 2
    assert calls == [(i + 1, 16) for i in range(16)]
    rounds = [
        sorted(
            (prompt.messages[0]["content"], seed) for prompt, _, seed in backend.asked[k : k + 2]
        )
        for k in range(0, 16, 2)
    ]
    assert rounds[0::2] == rounds[1::2]
    assert len({seed for part in rounds for _, seed in part}) == 8
    assert found["requests"] == 6
    assert found["aligned"]["tokens_per_request"] == found["plain"]["tokens_per_request"] > 4


async def test_figures_agree_with_each_other(tmp_path, settings):
    _, _, found = await measured(tmp_path, settings, n_clients=3, n_requests=9)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for kind in ("aligned", "plain"):
        figures = found[kind]
        for stage in STAGES:
            assert 0 <= figures[stage]["p50"] <= figures[stage]["p95"] <= figures[stage]["max"]
        rate = figures["requests_per_s"] * figures["tokens_per_request"]
        assert figures["tokens_per_s"] == pytest.approx(rate)
        assert figures["generate"]["max"] <= figures["total"]["max"]
    assert found["plain"]["solve"]["max"] == 0
    ratio = found["aligned"]["total"]["p50"] / found["plain"]["total"]["p50"]
    assert found["latency_ratio"] == pytest.approx(ratio)
    print_bench({"model": "fake", **found})


async def test_palette_is_served(tmp_path, settings):
    palette = PaletteOptions(targets={"words": {"at_most": 9.0}}, candidates=2)
    _, _, found = await measured(tmp_path, settings, palette)
    assert found["palette"] == {"targets": {"words": {"at_most": 9.0}}, "candidates": 4}
    with pytest.raises(PaletteError, match="wrods"):
        await measured(tmp_path, settings, PaletteOptions(targets={"wrods": "keep"}))


def test_more_clients_than_the_server_takes():
    told = CliRunner().invoke(app, ["bench", "--clients", "100000"])
    assert told.exit_code == 2
    assert "PALETTE_MAX_QUEUE" in told.stderr
