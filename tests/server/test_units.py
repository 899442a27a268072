"""Transformed values and watched ones, from the rewards file to the answer."""

from __future__ import annotations

import numpy as np
import pytest

from rewards import load_rewards
from rewards.config import TransformConfig
from rewards.transforms import LENGTH, fit
from server.aligning import in_units
from server.calibration import Calibration, CalibrationError
from server.units import Units
from solver import PaletteError, PilotSet
from tests.server.conftest import fake_calibration, run_fake

REWARDS = """\
version: 1
scorers:
  count: {kind: lexical, measure: words}
  letters: {kind: lexical, measure: characters}
  variety: {kind: lexical, measure: lexical_diversity}
values:
  words: {from: count, unit: words, watch: letters}
  length: {from: letters, unit: characters, transform: {shape: log_sigmoid, reference: 0.5}}
  variety: {from: variety, transform: {length_control: true}}
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "watched.yaml"
    path.write_text(REWARDS)
    return load_rewards(path)


async def test_a_transformed_and_a_watched_value(tmp_path, settings, suite):
    async with run_fake(tmp_path, settings, rewards=suite, is_calibrated=False) as running:
        aligner = running.context.aligner
        made = await calibrated(running)
        assert made.pilot.values == ("words", "length", "variety")
        assert made.measured.values == ("words", "length", "variety", "words.watch", LENGTH)
        base = made.measured.rewards[..., 1]
        # A level in characters is promised in the unit that is aligned.
        level = float(np.quantile(base, 0.6))
        fitted = made.units.fitted["length"]
        aligner.shelf.add(made, None)
        body = (await running.chat(palette={"targets": {"length": {"at_least": level}}})).json()
        report = body["palette"]
        assert report["targets"]["length"] == pytest.approx(fitted.level(level))
        assert report["status"] == "met"
        text = body["choices"][0]["message"]["content"]
        own = report["measured"]["length"]
        assert own["realised"] == len(text)
        assert report["realised"]["length"] == pytest.approx(fitted(np.array(float(len(text)))))
        assert own["weighted"] > own["candidates"]
        pair = report["watched"]["words"]
        assert pair["value"]["realised"] == len(text.split())
        assert pair["watch"]["realised"] == len(text)
        told = (await running.client.get("/metrics")).text
        assert 'palette_gain_count{kind="watch",value="words"} 1.0' in told
        assert 'palette_gain_count{kind="value",value="words"} 1.0' in told


async def calibrated(running):
    """Return a calibration of the fake model's own answers."""
    from server.calibrator import calibrate

    aligner = running.context.aligner
    made = await calibrate(
        aligner.backend,
        aligner.rewards,
        [({"role": "user", "content": f"question {n}"},) for n in range(40)],
        n_candidates=16,
        sampling=running.context.settings.sampling,
        prompts_source="test",
    )
    return in_units(made, aligner.rewards)


async def test_a_calibration_is_kept_as_measured(tmp_path, settings, suite):
    async with run_fake(tmp_path, settings, rewards=suite, is_calibrated=False) as running:
        made = await calibrated(running)
        made.save(tmp_path / "kept.npz")
        again = PilotSet.load(tmp_path / "kept.npz")
        np.testing.assert_array_equal(again.rewards, made.measured.rewards)
        assert made.id == again.fingerprint[:12]
        other = in_units(Calibration(again, made.info), running.context.aligner.rewards)
        np.testing.assert_array_equal(other.pilot.rewards, made.pilot.rewards)


async def test_without_a_calibration_a_transformed_value_cannot_be_asked_for(
    tmp_path, settings, suite
):
    async with run_fake(tmp_path, settings, rewards=suite, is_calibrated=False) as running:
        palette = {"targets": {"length": {"at_least": 5}}, "scope": "answer"}
        reply = await running.chat(palette=palette)
        assert reply.status_code == 422
        assert reply.json()["error"]["code"] == "calibration_missing"
        assert "length has a transform" in reply.json()["error"]["message"]
        # Others can, and it is reported as it is measured.
        palette = {"targets": {"words": {"multiplier": 0.1}}}
        assert (await running.chat(palette=palette)).status_code == 200


async def test_a_calibration_that_lacks_a_column(tmp_path, suite):
    async with suite:
        with pytest.raises(CalibrationError, match=r"it has no .*: calibrate again"):
            in_units(fake_calibration(), suite)


def units(**config):
    rewards = np.random.default_rng(0).normal(size=(30, 8))
    fitted = fit(TransformConfig(**config), rewards, np.abs(rewards))
    return Units(("a", "b", LENGTH), ("a", "b"), {"a": fitted}), fitted


def test_levels_and_floors_in_aligned_units():
    from server.schemas import PaletteOptions

    made, fitted = units(shape="quantile")
    options = PaletteOptions(
        targets={"a": {"between": [0.0, 0.5], "optional": True}, "b": {"at_least": 0.5}},
        floors={"a": -0.5, "b": 1.0},
    )
    found = made.translate(options)
    assert found.targets["a"] == {
        "between": [fitted.level(0.0), fitted.level(0.5)],
        "optional": True,
    }
    assert found.targets["b"] == {"at_least": 0.5}
    assert found.floors == {"a": fitted.level(-0.5), "b": 1.0}
    for kept in ({"quantile": 0.7}, {"gain": 0.5}, "keep", {"multiplier": 2.0}):
        assert made.translate(PaletteOptions(targets={"a": kept})).targets["a"] == kept
    # What is no number is for the solver to refuse.
    assert made.translate(PaletteOptions(targets={"a": {"at_least": "x"}})).targets["a"] == {
        "at_least": "x"
    }


@pytest.mark.parametrize("config", [{"centre": True}, {"length_control": True}])
def test_no_floors_on_values_that_look_at_more_than_the_reward(config):
    from server.schemas import PaletteOptions

    made, _ = units(**config)
    with pytest.raises(PaletteError, match="a floor says nothing about one answer"):
        made.translate(PaletteOptions(targets={}, floors={"a": 0.0}))
