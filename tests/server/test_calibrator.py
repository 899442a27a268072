"""Calibrations are what the seed says, whoever runs beside them, and a failure is one failure."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from rewards import RewardError, ScoringError
from server import embedded
from server.backends.base import BackendError, PromptError, SamplingSettings
from server.calibration import CalibrationError, folder_of, load_calibration
from server.calibrator import FEWEST_PROMPTS, calibrate
from tests.server.conftest import run_fake
from tests.server.fakes import FakeBackend
from tests.server.questions import prompts_of, questions, started
from tests.server.waiting import until

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 4}


PROMPTS = questions(20)


async def run(backend, rewards, prompts=PROMPTS, **options):
    options = {"n_candidates": 6, "sampling": SamplingSettings(), "prompts_source": "t"} | options
    return await calibrate(backend, rewards, prompts, **options)


class Shuffled(FakeBackend):
    """Prompts take turns of their own: the later a prompt, the sooner it is done."""

    async def generate(self, prompt, *arguments, **options):
        for _ in range(50 - int(prompt.messages[0]["content"].split()[-1])):
            await asyncio.sleep(0)
        async for candidate in super().generate(prompt, *arguments, **options):
            yield candidate


# what comes out


async def test_shape_order_and_record(tmp_path):
    sampling = SamplingSettings(temperature=0.7, top_p=0.9, top_k=5, max_tokens=12)
    async with started(tmp_path) as (backend, rewards):
        made = await run(backend, rewards, sampling=sampling, seed=3)
    pilot, info = made.pilot, made.info
    assert pilot.rewards.shape == (20, 6, 3)
    assert pilot.values == ("words", "variety", "log_likelihood")
    assert not pilot.pooled
    assert (info.temperature, info.top_p, info.top_k, info.max_tokens) == (0.7, 0.9, 5, 12)
    assert pilot.rewards[:, :, 0].max() == 12
    assert info.longest_answer_tokens == 13  # with the end token
    assert 0.2 < info.truncated_share < 0.6  # 8 of 20 lengths are above 12
    assert (info.model, info.prompts_source, info.seed) == ("fake", "t", 3)
    assert made.warnings_for(backend.fingerprint, rewards.fingerprint, sampling) == []


async def test_rewards_stand_where_their_candidates_do(tmp_path):
    """Row i, column k is candidate k of prompt i, though both come in another order."""
    async with started(tmp_path, Shuffled()) as (backend, rewards):
        made = await run(backend, rewards, concurrency=8, seed=5)
        seeds = np.random.SeedSequence(5).generate_state(20, dtype=np.uint64) >> 1
        for i in (0, 7, 19):
            prompt = await backend.render(PROMPTS[i])
            stream = backend.generate(prompt, 6, SamplingSettings(), int(seeds[i]))
            texts = {one.index: one.text async for one in stream}
            words = [len(texts[k].split()) for k in range(6)]
            np.testing.assert_array_equal(made.pilot.rewards[i, :, 0], words)


async def test_the_seed_decides_and_concurrency_does_not(tmp_path):
    async with started(tmp_path, Shuffled()) as (backend, rewards):
        ids = [
            (await run(backend, rewards, concurrency=concurrency, seed=seed)).id
            for concurrency, seed in ((1, 0), (4, 0), (50, 0), (4, 1))
        ]
    assert ids[0] == ids[1] == ids[2] != ids[3]


async def test_a_shorter_run_begins_like_a_longer_one(tmp_path):
    async with started(tmp_path) as (backend, rewards):
        long = await run(backend, rewards)
        short = await run(backend, rewards, PROMPTS[:17])
    np.testing.assert_array_equal(short.pilot.rewards, long.pilot.rewards[:17])


async def test_prompts_do_not_share_their_draws(tmp_path):
    async with started(tmp_path) as (backend, rewards):
        made = await run(backend, rewards, PROMPTS[:1] * 20)
    assert len({row.tobytes() for row in made.pilot.rewards}) == 20


async def test_progress_counts_every_prompt_once(tmp_path):
    calls = []
    async with started(tmp_path) as (backend, rewards):
        await run(backend, rewards, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 20) for i in range(1, 21)]


# prompts that cannot be used


async def test_prompts_that_do_not_fit_are_left_out(tmp_path, caplog):
    long = prompts_of("word " * 600)
    calls = []
    async with started(tmp_path) as (backend, rewards):
        made = await run(
            backend, rewards, PROMPTS[:9] + long + PROMPTS[9:] + long,
            progress=lambda done, total: calls.append((done, total)),
        )  # fmt: skip
    assert made.pilot.n_prompts == 20
    assert calls[-1] == (22, 22)
    assert "2 of 22 prompts" in caplog.text
    assert "word" not in caplog.text  # a log holds no prompts


async def test_prompts_that_the_template_refuses_are_left_out(tmp_path):
    class Picky(FakeBackend):
        async def render(self, messages):
            if messages[0]["content"] == "Question 3":
                raise PromptError("no")
            return await super().render(messages)

    async with started(tmp_path, Picky()) as (backend, rewards):
        assert (await run(backend, rewards)).pilot.n_prompts == 19


@pytest.mark.parametrize("n_usable", [0, 1, FEWEST_PROMPTS - 1])
async def test_too_few_prompts(tmp_path, n_usable):
    too_long = prompts_of(*["word " * 600] * FEWEST_PROMPTS)
    prompts = PROMPTS[:n_usable] + too_long
    async with started(tmp_path) as (backend, rewards):
        with pytest.raises(CalibrationError, match=f"only {n_usable} of {len(prompts)} prompts"):
            await run(backend, rewards, prompts)


async def test_no_prompts_at_all(tmp_path):
    async with started(tmp_path) as (backend, rewards):
        with pytest.raises(CalibrationError, match="only 0 of 0"):
            await run(backend, rewards, [])


# failures


async def test_backend_failure_is_told_as_it_is(tmp_path):
    backend = FakeBackend(hold=True)
    async with started(tmp_path, backend) as (_, rewards):
        working = asyncio.create_task(run(backend, rewards, concurrency=5))
        await until(lambda: backend.n_started == 5)
        backend.failure = BackendError("the device is gone")
        backend.released.set()
        with pytest.raises(BackendError, match="device is gone"):
            await working
    assert backend.n_started == backend.n_cancelled == 5


async def test_one_failure_stops_the_others(tmp_path):
    class Breaks(FakeBackend):
        async def generate(self, prompt, *arguments, **options):
            if prompt.messages[0]["content"] == "Question 3":
                raise BackendError("broke")
            async for candidate in super().generate(prompt, *arguments, **options):
                yield candidate

    backend = Breaks(hold=True)
    async with started(tmp_path, backend) as (_, rewards):
        with pytest.raises(BackendError, match="broke"):
            await run(backend, rewards, concurrency=4)
    assert backend.n_cancelled == backend.n_started == 3


async def test_reward_failure_is_told_as_it_is(tmp_path, monkeypatch):
    async with started(tmp_path) as (backend, rewards):

        async def score(samples, names=None):
            raise ScoringError("words", ("words",), "out of order")

        monkeypatch.setattr(rewards, "score", score)
        with pytest.raises(RewardError, match="out of order"):
            await run(backend, rewards, concurrency=4)


async def test_cancelling_stops_the_generation(tmp_path):
    backend = FakeBackend(hold=True)
    async with started(tmp_path, backend) as (_, rewards):
        working = asyncio.create_task(run(backend, rewards, concurrency=4))
        await until(lambda: backend.n_started == 4)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
    assert backend.n_cancelled == 4


# at the server's start


@pytest.fixture
def self_calibrating(settings, tmp_path, monkeypatch):
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps(f"Question {i}") + "\n" for i in range(20)))
    monkeypatch.setattr(embedded, "PROMPTS", path)
    return settings.model_copy(update={"calibrate_at_start": True, "calibration_candidates": 8})


async def background(running):
    return (await running.client.get("/ready")).json()["calibration"]["background"]


async def test_server_calibrates_itself(tmp_path, self_calibrating):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, self_calibrating, backend, is_calibrated=False) as running:
        await until(lambda: backend.n_started > 0)
        assert (await background(running))["state"] == "running"
        early = await running.chat(palette=SHORT)
        assert early.status_code == 422
        assert early.json()["error"]["code"] == "calibration_missing"
        backend.released.set()
        await until(lambda: running.context.calibrating.state != "running")
        told = await background(running)
        assert (told["state"], told["done"], told["total"]) == ("done", 20, 20)
        report = (await running.chat(palette=SHORT)).json()["palette"]
        (path,) = folder_of(self_calibrating.state_dir).iterdir()
    assert report["calibration"]["valid"]
    assert report["calibration"]["prompts"] == 20
    assert load_calibration(path).id == report["calibration"]["id"]
    # The next start takes the one that was kept.
    async with run_fake(tmp_path, self_calibrating, is_calibrated=False) as running:
        assert running.context.aligner.calibration.id == report["calibration"]["id"]
        assert (await background(running))["state"] == "none"
        assert running.backend.n_started == 0


async def test_requests_are_served_while_the_server_calibrates(tmp_path, self_calibrating):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, self_calibrating, backend, is_calibrated=False) as running:
        await until(lambda: backend.n_started > 0)
        given = {"targets": {"words": {"multiplier": -1}}, "candidates": 4}
        answering = asyncio.create_task(running.chat(palette=given))
        n_calibrating = backend.n_started
        await until(lambda: backend.n_started > n_calibrating)
        backend.released.set()
        assert (await answering).status_code == 200


@pytest.mark.parametrize("culprit", ["backend", "prompts", "disk"])
async def test_failed_calibration_leaves_the_server_up(
    tmp_path, self_calibrating, culprit, monkeypatch, caplog
):
    backend = FakeBackend(hold=True)
    if culprit == "prompts":
        embedded.PROMPTS.write_text('"only one"\n')
    if culprit == "disk":
        self_calibrating.state_dir.write_text("a file where the folder should be")
    async with run_fake(tmp_path, self_calibrating, backend, is_calibrated=False) as running:
        if culprit == "backend":
            await until(lambda: backend.n_started > 0)
            backend.failure = BackendError("the device is gone")
        backend.released.set()
        await until(lambda: running.context.calibrating.state == "failed")
        told = await running.client.get("/ready")
        wanted = {"backend": "device is gone", "prompts": "only 1 of 1", "disk": "state"}[culprit]
        assert told.status_code == 200
        assert wanted in told.json()["calibration"]["background"]["error"]
        assert wanted in caplog.text
        backend.failure = None
        assert (await running.chat(palette=SHORT)).json()["error"]["code"] == "calibration_missing"
        assert (await running.chat(palette=SHORT | {"scope": "answer"})).status_code in (200, 422)


async def test_server_that_stops_does_not_finish_its_calibration(tmp_path, self_calibrating):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, self_calibrating, backend, is_calibrated=False):
        await until(lambda: backend.n_started > 0)
    assert backend.n_cancelled == backend.n_started
    assert not list(tmp_path.rglob("*.npz"))


async def test_next_start_continues_what_the_last_one_began(tmp_path, self_calibrating):
    backend = FakeBackend()
    backend.permits = asyncio.Semaphore(8 * 7)  # those of seven prompts, four at a time
    async with run_fake(tmp_path, self_calibrating, backend, is_calibrated=False) as running:
        await until(lambda: running.context.calibrating.done >= 3)
    async with run_fake(tmp_path, self_calibrating, is_calibrated=False) as running:
        await until(lambda: running.context.calibrating.state == "done")
        report = (await running.chat(palette=SHORT)).json()["palette"]
        assert running.backend.n_started <= 17 + 1
    assert report["calibration"]["valid"]
    assert report["calibration"]["prompts"] == 20


async def test_no_calibration_when_the_operator_wants_none(tmp_path, self_calibrating, caplog):
    ours = self_calibrating.model_copy(update={"calibrate_at_start": False})
    async with run_fake(tmp_path, ours, is_calibrated=False) as running:
        await asyncio.sleep(0.02)
        assert (await background(running))["state"] == "none"
    assert running.backend.n_started == 0
    assert "run `palette calibrate`" in caplog.text
