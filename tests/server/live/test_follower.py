import asyncio
import logging
from dataclasses import replace

import numpy as np
import pytest

from server.live.track import Track
from server.settings import load_settings
from tests.server.conftest import chat_body, fake_calibration, run_fake
from tests.server.fakes import EVERYTHING, FakeBackend
from tests.server.waiting import until

TARGETS = {"words": {"quantile": 0.7}}


class Shifting(FakeBackend):
    """Answers `factor` times as long, once it is told to."""

    factor = 1

    def _shaped(self, drawn, prompt, sampling):
        drawn = super()._shaped(drawn, prompt, sampling)
        return replace(drawn, text=" ".join([drawn.text] * self.factor))


@pytest.fixture
def settings(tmp_path):
    return load_settings(
        state_dir=tmp_path / "state", calibrate_at_start=False, refresh_half_life=50
    )


async def ask(running, numbers, targets=TARGETS, **palette):
    """Send one request for each number, with a prompt and a seed of its own; return the reports.

    They are counted ten at a time at most.
    """
    found = []
    for number in numbers:
        content = " ".join(["word"] * (number % 7)) + f" {number}"
        response = await running.chat(
            messages=[{"role": "user", "content": content}],
            seed=number,
            palette={"targets": targets, "candidates": 16} | palette,
        )
        assert response.status_code == 200, response.text
        found.append(response.json()["palette"])
        if len(found) % 10 == 0:
            await running.context.follower.settled()
    await running.context.follower.settled()
    return found


async def state(running):
    return (await running.client.get("/v1/palette/calibration")).json()


async def test_live_requests_make_new_versions(running):
    before = fake_calibration()
    first, *_ = await ask(running, range(30))
    assert (first["calibration"]["version"], first["calibration"]["live_prompts"]) == (0, 0)
    last = (await ask(running, [100]))[0]["calibration"]
    assert last["id"] == before.id
    assert last["version"] >= 1
    assert last["live_prompts"] > 0
    assert last["valid"]
    assert last["updated"] > first["calibration"]["updated"]
    told = await state(running)
    assert told["calibration"]["version"] == running.context.aligner.calibration.version
    assert told["calibration"]["prompts"] < 200  # a half-life of 50 levels off at 72
    assert told["refresh"] == {"mode": "on", "half_life": 50, "requests": 31, "left_out": {}}
    assert set(told["drift"]["values"]["words"]) == {"promise", "base"}
    assert told["drift"]["values"]["words"]["base"]["state"] == "ok"


async def test_a_new_version_is_solved_before_it_is_served(running):
    cache = running.context.aligner.promiser.cache
    lookup, missed = cache.lookup, []
    cache.lookup = lambda *a, **k: missed.append((found := lookup(*a, **k)) is None) or found
    await ask(running, range(60))
    assert running.context.aligner.calibration.version >= 3
    assert (len(missed), sum(missed)) == (60, 1)  # the very first


async def test_targets_are_those_of_the_version_in_use(tmp_path, settings):
    backend = Shifting()
    async with run_fake(tmp_path, settings, backend) as running:
        backend.factor = 3
        reports = await ask(running, range(150))
        now = running.context.aligner.calibration
        report = (await ask(running, [500]))[0]
    assert reports[0]["targets"]["words"] == pytest.approx(
        fake_calibration().pilot.quantile(0.7)[0]
    )
    assert report["calibration"]["version"] == now.version
    assert report["targets"]["words"] == pytest.approx(now.pilot.quantile(0.7)[0])
    assert report["targets"]["words"] > 2 * reports[0]["targets"]["words"]


async def test_what_live_requests_are_too_few_for_is_promised_on_the_root(running):
    await ask(running, range(120))
    pilot = running.context.aligner.calibration.pilot
    assert pilot.n_candidates == 16
    wide = (await ask(running, [1000], candidates=32))[0]
    assert (wide["candidates"], wide["calibration"]["version"]) == (32, 0)
    auto = (await ask(running, [1001], candidates="auto"))[0]
    assert auto["calibration"]["version"] > 0
    reaching = ((pilot, 16), (fake_calibration().pilot, 32))
    limits = [one.groups(n).rewards[..., 0].max(axis=1).mean() for one, n in reaching]
    level = {"words": {"at_least": sum(limits) / 2}}
    far = (await ask(running, [1002], level, candidates="auto"))[0]
    assert far["candidates"] > 16
    assert far["calibration"]["version"] == 0
    body = {"palette": {"targets": TARGETS, "candidates": 32}}
    assert (await running.client.post("/v1/palette/solve", json=body)).status_code == 200
    body = {"values": ["words", "variety"], "points": 3, "palette": {"candidates": 32}}
    assert (await running.client.post("/v1/palette/frontier", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"temperature": 0.5}, "sampling"),
        ({"stop": ["river"]}, "sampling"),
        ({"palette": {"targets": TARGETS, "deadline_ms": 60_000}}, "deadline"),
        ({"palette": {"targets": TARGETS, "candidates": 4}}, "few_candidates"),
        ({"palette": {"targets": TARGETS, "scope": "answer"}}, None),
        ({"palette": {"targets": {"words": {"multiplier": 0.2}}}}, None),
        ({}, None),
    ],
)
async def test_only_a_fair_sample_is_taken(running, change, reason):
    body = {"palette": {"targets": TARGETS}} | change
    assert (await running.chat(**body)).status_code == 200
    follower = running.context.follower
    await follower.settled()
    track = follower.track(fake_calibration())
    assert dict(track.left_out) == ({} if reason is None else {reason: 1})
    # too few for a quantile within a prompt, enough to hold against what was promised
    assert track.taken == (reason in (None, "few_candidates"))
    assert track._reservoir.n_live == (reason is None)


async def test_raw_prompts_and_requests_without_a_palette_are_no_sample(tmp_path, settings):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    async with run_fake(tmp_path, settings, FakeBackend(features=EVERYTHING)) as running:
        body = {"model": "fake", "prompt": "The river", "max_tokens": 512}
        body["palette"] = {"targets": TARGETS}
        response = await running.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        response = await running.chat(tools=[tool], palette={"targets": TARGETS})
        assert response.status_code == 200, response.text
        assert (await running.chat()).status_code == 200
        await running.context.follower.settled()
        track = running.context.follower.track(fake_calibration())
        assert (dict(track.left_out), track.taken) == ({"prompt": 2}, 0)


async def test_one_prompt_a_thousand_times_takes_nothing_over(running):
    for seed in range(20):
        await running.chat(seed=seed, palette={"targets": TARGETS})
    await running.context.follower.settled()
    track = running.context.follower.track(fake_calibration())
    assert (track.taken, track.left_out["repeated"]) == (2, 18)


async def test_requests_in_flight_keep_the_version_they_began_with(tmp_path, settings):
    async with run_fake(tmp_path, settings) as running:
        await ask(running, range(3))
        running.backend.released.clear()
        body = chat_body(palette={"targets": TARGETS, "candidates": 16})
        held = asyncio.create_task(running.client.post("/v1/chat/completions", json=body))
        await until(lambda: running.backend.n_started == 4)
        track = running.context.follower.track(fake_calibration())
        for seed in range(30):
            track._reservoir.add(np.random.default_rng(seed).normal(size=(16, 3)))
        track.refresh()
        running.context.follower._swap(track)
        assert running.context.aligner.calibration.version == 1
        running.backend.released.set()
        report = (await held).json()["palette"]
        assert report["calibration"]["version"] == 0


async def test_a_frozen_calibration_stays_and_is_watched(tmp_path, settings, caplog):
    """The answers become three times as long; then as they were."""
    backend = Shifting()
    frozen = settings.model_copy(update={"refresh": "frozen"})
    async with run_fake(tmp_path, frozen, backend) as running:
        await ask(running, range(60))
        assert (await state(running))["drift"]["warnings"] == []
        backend.factor = 3
        with caplog.at_level(logging.INFO):
            await ask(running, range(1000, 1100))
        told = await state(running)
        assert told["calibration"]["version"] == 0
        against = told["drift"]["values"]["words"]
        assert (against["promise"]["state"], against["base"]["state"]) == ("above", "above")
        assert against["promise"]["low"] > against["promise"]["allowed"] > 0
        alarms = [r for r in caplog.records if r.getMessage().startswith("drift: words is above")]
        assert len(alarms) == 2  # one for each, once
        report = (await ask(running, [2000]))[0]["calibration"]
        assert not report["valid"]
        assert any(
            w.startswith("drift: words is above what is promised") for w in report["warnings"]
        )
        metrics = (await running.client.get("/metrics")).text
        name = fake_calibration().id
        assert (
            f'palette_drift{{against="promise",calibration="{name}",value="words"}} 1.0' in metrics
        )
        assert f'palette_calibration_version{{calibration="{name}"}} 0.0' in metrics
        backend.factor = 1
        with caplog.at_level(logging.INFO):
            await ask(running, range(3000, 3400))
        assert (await state(running))["drift"]["warnings"] == []
        over = [r for r in caplog.records if "is over" in r.getMessage()]
        assert sum("of words" in r.getMessage() for r in over) == 2
    kept = [path.name for path in (settings.state_dir / "live").iterdir()]
    assert kept == [f"{name}.watch.npz"]  # what is found, and no live prompts


async def test_a_refreshed_calibration_ends_its_drift_itself(tmp_path, settings):
    backend = Shifting()
    async with run_fake(tmp_path, settings, backend) as running:
        backend.factor = 3
        await ask(running, range(60))
        assert (await state(running))["drift"]["warnings"]
        await ask(running, range(60, 600))
        told = await state(running)
        assert told["drift"]["warnings"] == []
        last = await ask(running, range(600, 700))
    realised = [report["realised"]["words"] for report in last]
    promised = [report["expected"]["words"]["level"] for report in last]
    off = np.mean(realised) - np.mean(promised)
    assert abs(off) < 4 * np.std(realised) / 10 + 3 * last[-1]["expected"]["words"]["stderr"]


async def test_what_was_learnt_survives_a_restart(tmp_path, settings, caplog):
    async with run_fake(tmp_path, settings) as running:
        await ask(running, range(60))
        before = running.context.aligner.calibration
        track = running.context.follower.track(before)
        version = before.version + (track._reservoir.n_new > 0)
        root = tmp_path / "root.npz"
    fake_calibration().save(root)
    again = settings.model_copy(update={"calibration": root})
    for refresh in ("on", "frozen"):
        kept = again.model_copy(update={"refresh": refresh})
        async with run_fake(tmp_path, kept, is_calibrated=False) as running:
            now = running.context.aligner.calibration
            assert now.version == version
            assert (now.id, now.live_prompts > 0) == (before.id, True)
            assert (await ask(running, [900]))[0]["calibration"]["version"] == version
            version += 1  # of the one request, once it stops
    path = settings.state_dir / "live" / f"{before.id}.npz"
    path.write_bytes(path.read_bytes()[:-100])
    async with run_fake(tmp_path, again, is_calibrated=False) as running:
        assert running.context.aligner.calibration.version == 0
    assert "live prompts begin anew" in caplog.text
    assert path.with_suffix(".damaged").exists()
    off = again.model_copy(update={"refresh": "off"})
    async with run_fake(tmp_path, off, is_calibrated=False) as running:
        assert running.context.follower is None
        assert running.context.aligner.calibration.version == 0
        told = await state(running)
        assert (told["refresh"]["mode"], told["drift"]) == ("off", None)


async def test_a_failure_to_follow_stops_no_answer(running, monkeypatch, caplog):
    def fail(self, arrival, reason):
        raise RuntimeError("nothing works")

    with monkeypatch.context() as broken:
        broken.setattr(Track, "take", fail)
        await ask(running, range(3))
    assert "could not be followed" in caplog.text
    await ask(running, range(3, 5))
    assert running.context.follower.track(fake_calibration()).taken == 2


async def test_what_comes_soon_after_is_counted_and_written_together(
    tmp_path, settings, monkeypatch
):
    """And stopping does not wait for more to come."""
    monkeypatch.setattr("server.live.follower._PACE_S", 3600.0)
    async with run_fake(tmp_path, settings) as running:
        follower = running.context.follower

        async def answer(content):
            messages = [{"role": "user", "content": content}]
            reply = await running.chat(messages=messages, palette={"targets": TARGETS})
            assert reply.status_code == 200

        await answer("the first")
        await until(lambda: follower.tracks() and follower._idle.is_set())
        track = follower.track(fake_calibration())
        assert track.taken == 1
        for number in range(3):
            await answer(f"another {number}")
        assert track.taken == 1
        await follower.settled()
        assert track.taken == 4
        await answer("the last")
    assert track.taken == 5


async def test_without_a_calibration_there_is_nothing_to_tell(tmp_path, settings):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        await running.chat(palette={"targets": TARGETS, "scope": "answer"})
        assert (await state(running))["calibration"] is None
