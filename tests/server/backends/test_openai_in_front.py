"""The whole server in front of an upstream, which may be another Palette."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rewards import Message
from server.backends.base import ModelLoadError, SamplingSettings
from server.backends.openai_remote import OpenAIRemoteBackend
from server.calibrator import calibrate
from tests.server.backends.fake_upstream import FakeUpstream, Fault, listening
from tests.server.backends.upstream_backend import HELLO, connected
from tests.server.conftest import run_fake
from tests.server.fakes import Started, lexical_rewards

pytestmark = pytest.mark.usefixtures("_quick_pauses")


async def test_palette_in_front_of_palette(tmp_path, settings):
    """The same answers as the upstream's own backend gives, aligned here on its own values."""
    (tmp_path / "up").mkdir()
    (tmp_path / "down").mkdir()
    async with (
        run_fake(tmp_path / "up", settings) as behind,
        listening(behind.app) as url,
        run_fake(
            tmp_path / "down", settings, OpenAIRemoteBackend(url, extra_body={"palette": None})
        ) as front,
    ):
        assert front.backend.health() == {"state": "ok"}
        lengths, rewards = [], []
        palette = {"targets": {"words": {"at_most": 7.0}}, "candidates": 8, "report": "full"}
        for seed in range(150):
            reply = await front.chat(palette=palette, seed=seed)
            assert reply.status_code == 200, reply.text
            body = reply.json()
            lengths.append(len(body["choices"][0]["message"]["content"].split()))
            detail = body["palette"]["candidates_detail"]
            assert len(detail) == 8
            rewards += [
                (one["rewards"]["words"], one["rewards"]["log_likelihood"]) for one in detail
            ]
    # The fake's answers have 1 to 20 words, each length as likely (deviation 5.8), and mean
    # log-probability -1 a word; five standard errors of 1,200.
    words, likelihoods = np.array(rewards).T
    assert abs(words.mean() - 10.5) < 5 * 5.8 / math.sqrt(1200)
    assert abs((words * likelihoods).sum() / words.sum() + 1) < 5 / math.sqrt(words.sum())
    assert np.bincount(words.astype(int), minlength=21)[1:].min() > 30
    expected = body["palette"]["expected"]["words"]["level"]
    assert expected <= 7 + 1e-6
    assert abs(np.mean(lengths) - expected) < 5 * 5.0 / math.sqrt(150)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault(500), 502, "upstream_failed"),
        (Fault(503), 503, "backend_unavailable"),
        (Fault(hang=True), 504, "upstream_timeout"),
        (Fault(429, headers={"Retry-After": "77"}), 429, "upstream_busy"),
        (Fault(400, "bad role"), 400, "invalid_messages"),
    ],
)
async def test_errors_travel_to_the_client(tmp_path, settings, fault, status, code):
    upstream = FakeUpstream()
    async with (
        connected(upstream, max_retries=0, timeout_s=1.0) as backend,
        run_fake(tmp_path, settings, Started(backend)) as front,
    ):
        upstream.faults.append(fault)
        reply = await front.chat(model="up/model", palette=None)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        if status == 429:
            assert reply.headers["Retry-After"] == "77"
        reply = await front.chat(model="up/model", palette=None)
        assert reply.json()["usage"]["prompt_tokens"] == 11


@pytest.mark.parametrize("scope", ["traffic", "answer"])
async def test_fewer_candidates_are_told(tmp_path, settings, scope):
    upstream = FakeUpstream()
    palette = {"targets": {"words": {"gain": -0.2}}, "candidates": 8, "scope": scope}
    async with (
        connected(upstream, n_per_request=1, max_retries=0) as backend,
        run_fake(tmp_path, settings, Started(backend)) as front,
    ):
        upstream.faults.extend([Fault(500)] * 3)
        report = (await front.chat(model="up/model", palette=palette, seed=3)).json()["palette"]
        assert report["candidates"] == 5
        assert "5 of 8" in report["calibration"]["warnings"][0]
        assert "upstream" in report["calibration"]["warnings"][0]
        # Five are not enough for six choices.
        upstream.faults.extend([Fault(500)] * 3)
        reply = await front.chat(model="up/model", palette=palette, n=6)
        assert reply.status_code == 502
        assert "5 of 8" in reply.json()["error"]["message"]


async def test_values_that_read_log_probabilities_need_them(tmp_path, settings):
    async with connected(FakeUpstream(has_logprobs=False)) as backend:
        with pytest.raises(ModelLoadError, match="log_likelihood is computed from log-prob"):
            async with run_fake(tmp_path, settings, Started(backend)):
                pass


async def test_a_calibration_leaves_out_what_is_not_whole(tmp_path, caplog):
    upstream = FakeUpstream()
    rewards = lexical_rewards(tmp_path)
    await rewards.start()
    prompts = [HELLO] * 20 + [(Message(role="user", content="word " * 300),)]
    async with connected(upstream, n_per_request=1, max_retries=0) as backend:
        upstream.faults.extend([Fault(500)] * 2)
        calibration = await calibrate(
            backend, rewards, prompts, n_candidates=4, sampling=SamplingSettings(),
            prompts_source="test", concurrency=1,
        )  # fmt: skip
    await rewards.close()
    assert calibration.pilot.rewards.shape[:2] == (19, 4)
    assert "1 of 21 prompts did not get all" in caplog.text
    assert "1 of 21 prompts do not fit" in caplog.text
