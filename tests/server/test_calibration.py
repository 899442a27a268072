"""Calibrations on disk and in place: what they cover, what cannot be used, who gets which."""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import replace

import numpy as np
import pytest

from server.app import running_app
from server.backends.base import SamplingSettings
from server.calibration import (
    Calibration,
    CalibrationError,
    default_path,
    load_calibration,
)
from server.settings import load_settings
from solver import PilotError, PilotSet
from tests.server.conftest import fake_calibration, run_fake
from tests.server.fakes import FakeBackend, lexical_rewards
from tests.server.waiting import until

VALUES = ("words", "variety", "log_likelihood")
MODEL = "f" * 64
SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 16}


def made(seed=0, values=VALUES, **info):
    """Return a small calibration; other seeds are other calibrations."""
    rewards = np.random.default_rng(seed).normal(size=(16, 8, len(values)))
    return Calibration(PilotSet(rewards, values), fake_calibration().info.model_copy(update=info))


# files


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "one.npz"
    one = fake_calibration()
    one.save(path)
    back = load_calibration(path)
    assert back.info == one.info
    assert back.id == one.id
    assert back.pilot.values == one.pilot.values
    np.testing.assert_array_equal(back.pilot.rewards, one.pilot.rewards)
    assert os.listdir(path.parent) == ["one.npz"]


def foreign(path):
    path.write_text("hello there\n")


def pilot_without_record(path):
    PilotSet(np.ones((2, 3, 1)), ("words",)).save(path)


def pilot_as_lines(path):
    path.write_text('{"prompt": "a", "rewards": {"words": [1.0, 2.0]}}\n')


def record_of_the_wrong_shape(path):
    PilotSet(np.ones((2, 3, 1)), ("words",), metadata={"calibration": {"model": "m"}}).save(path)


def record_that_is_no_object(path):
    PilotSet(np.ones((2, 3, 1)), ("words",), metadata={"calibration": [1]}).save(path)


def cut(share):
    def write(path):
        made().save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])

    write.__name__ = f"cut_at_{share}"
    return write


def flipped(path):
    made().save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def changed_rewards(path):
    made().save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["rewards"] = arrays["rewards"] + 1
    np.savez(path, **arrays)


def metadata_that_is_no_object(path):
    made().save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["metadata"] = np.array("[1, 2]")
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None, lambda path: path.write_bytes(b""), lambda path: path.mkdir(), foreign,
        pilot_without_record, pilot_as_lines, record_of_the_wrong_shape, record_that_is_no_object,
        cut(0.02), cut(0.5), cut(0.9), cut(0.999), flipped, changed_rewards,
        metadata_that_is_no_object,
    ],
    ids=lambda write: write.__name__,
)  # fmt: skip
def test_file_that_cannot_be_used(tmp_path, write):
    path = tmp_path / "some.npz"
    write(path)
    with pytest.raises(CalibrationError) as caught:
        load_calibration(path)
    assert str(path) in str(caught.value)
    assert "palette calibrate" in str(caught.value)


def test_a_flipped_byte_is_told_or_changes_nothing(tmp_path):
    path = tmp_path / "some.npz"
    made().save(path)
    whole = path.read_bytes()
    # Headers of the archive stand at both ends; the middle is numbers and checksums.
    ends = [*range(0, 300, 7), *range(len(whole) - 600, len(whole), 5)]
    for at in [*ends, *range(300, len(whole) - 600, 97)]:
        data = bytearray(whole)
        data[at] ^= 0xFF
        path.write_bytes(data)
        try:
            found = load_calibration(path)
        except CalibrationError:
            continue
        assert (found.id, found.info) == (made().id, made().info)


def test_what_pickle_would_load_is_refused(tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, format=np.array([{}], dtype=object))
    with pytest.raises(CalibrationError, match=r"some\.npz"):
        load_calibration(path)


@pytest.mark.parametrize("fails", ["writing", "renaming"])
def test_failed_write_leaves_the_old_one_whole(tmp_path, monkeypatch, fails):
    path = tmp_path / "one.npz"
    made(0).save(path)
    before = path.read_bytes()

    def break_off(file=None, *args, **arrays):
        if fails == "writing":
            file.write(b"PK half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*(np, "savez") if fails == "writing" else (os, "replace"), break_off)
    with pytest.raises((PilotError, CalibrationError), match="No space left"):
        made(1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["one.npz"]
    assert load_calibration(path).id == made(0).id


def test_readers_see_the_old_or_the_new_never_a_mixture(tmp_path):
    path = tmp_path / "one.npz"
    ones = [made(seed) for seed in range(20)]
    ones[0].save(path)
    seen = []
    for one in ones[1:]:
        with path.open("rb") as before:
            one.save(path)
            held = before.read()  # a reader that had it open goes on reading the old one
        (tmp_path / "held.npz").write_bytes(held)
        seen.append((load_calibration(tmp_path / "held.npz").id, load_calibration(path).id))
    ids = [one.id for one in ones]
    assert seen == list(itertools.pairwise(ids))


# what a calibration covers


INFO = {"max_tokens": 512, "longest_answer_tokens": 21, "truncated_share": 0.0}


@pytest.mark.parametrize(
    ("sampling", "info", "told"),
    [
        ({}, {}, []),
        ({"temperature": 0.7}, {}, ["temperature=0.7"]),
        ({"top_p": 0.9}, {}, ["top_p=0.9"]),
        ({"top_k": 50}, {}, ["top_k=50"]),
        ({"stop": ("\n",)}, {}, ["stop strings"]),
        ({"min_p": 0.1}, {}, ["min_p=0.1"]),
        ({"presence_penalty": 1.0}, {}, ["presence_penalty=1"]),
        ({"frequency_penalty": -1.0}, {}, ["frequency_penalty=-1"]),
        ({"repetition_penalty": 1.2}, {}, ["repetition_penalty=1.2"]),
        ({"logit_bias": ((1, 1.0),)}, {}, ["logit_bias"]),
        ({"json_schema": "{}"}, {}, ["response_format"]),
        ({"temperature": 0.0}, {}, ["temperature=0", "no effect"]),
        ({"temperature": 0.0}, {"temperature": 0.0}, ["no effect"]),
        ({"temperature": 0.7}, {"temperature": 0.7}, []),
        # No answer was longer than 21 tokens: 21 and more cut nothing.
        ({"max_tokens": 20}, {}, ["max_tokens=20"]),
        ({"max_tokens": 21}, {}, []),
        ({"max_tokens": 4096}, {}, []),
        # 5 % were cut at 32: a longer limit gives longer answers, a shorter one shorter ones.
        ({"max_tokens": 32}, {"max_tokens": 32, "longest_answer_tokens": 32,
                              "truncated_share": 0.05}, []),
        ({"max_tokens": 33}, {"max_tokens": 32, "longest_answer_tokens": 32,
                              "truncated_share": 0.05}, ["max_tokens=33"]),
        ({"max_tokens": 31}, {"max_tokens": 32, "longest_answer_tokens": 32,
                              "truncated_share": 0.05}, ["max_tokens=31"]),
        ({"max_tokens": 33}, {"max_tokens": 32, "longest_answer_tokens": 32,
                              "truncated_share": 0.005}, []),
        ({"temperature": 0.5, "top_p": 0.5, "top_k": 5, "max_tokens": 1, "stop": ("a",)}, {},
         ["temperature", "top_p", "top_k", "max_tokens", "stop"]),
    ],
)  # fmt: skip
def test_sampling_that_is_not_covered(sampling, info, told):
    one = made(**(INFO | info))
    warnings = one.warnings_for(
        MODEL, one.info.rewards_fingerprint, replace(SamplingSettings(), **sampling)
    )
    assert len(warnings) == len(told)
    for warning, word in zip(sorted(warnings), sorted(told), strict=True):
        assert word in warning


def test_other_model_and_other_rewards_are_told_apart():
    one = made()
    sampling = SamplingSettings()
    rewards = one.info.rewards_fingerprint
    (model,) = one.warnings_for("0" * 64, rewards, sampling)
    (reward,) = one.warnings_for(MODEL, "0" * 64, sampling)
    assert "model weights" in model
    assert "reward models" in reward
    assert all("palette calibrate" in warning for warning in (model, reward))


# where it is kept


def test_default_path_differs_with_every_part(tmp_path):
    paths = {
        default_path(tmp_path, *parts)
        for parts in [("m", "f", "r"), ("m", "g", "r"), ("m", "f", "s"), ("o/m", "f", "r")]
    }
    assert len(paths) == 4
    assert all(path.parent == tmp_path / "calibrations" for path in paths)


@pytest.mark.parametrize("model", ["../../etc/passwd", "a/b\\c d", "", "\0", "模型"])
def test_default_path_stays_in_its_folder(tmp_path, model):
    path = default_path(tmp_path, model, "f", "r")
    assert path.resolve().parent == (tmp_path / "calibrations").resolve()
    made().save(path)
    assert load_calibration(path).id == made().id


# in the server


@pytest.mark.parametrize("write", [lambda path: None, foreign, cut(0.5), pilot_without_record])
async def test_server_does_not_start_on_a_calibration_it_cannot_use(tmp_path, write):
    path = tmp_path / "mine.npz"
    write(path)
    settings = load_settings(state_dir=tmp_path, calibration=path)
    backend, rewards = FakeBackend(), lexical_rewards(tmp_path)
    with pytest.raises(CalibrationError, match=r"mine\.npz"):
        async with running_app(settings, backend=backend, rewards=rewards):
            pass
    assert not backend.is_up


async def test_server_finds_the_one_it_keeps(tmp_path, settings):
    one = fake_calibration()
    info = one.info
    one.save(
        default_path(
            settings.state_dir, info.model, info.model_fingerprint, info.rewards_fingerprint
        )
    )
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        report = (await running.chat(palette=SHORT)).json()["palette"]
    assert report["calibration"]["id"] == one.id
    assert report["calibration"]["valid"]


async def test_named_calibration_of_another_model_serves_with_a_warning(tmp_path, settings):
    path = tmp_path / "mine.npz"
    one = fake_calibration()
    replace(one, info=one.info.model_copy(update={"model_fingerprint": "0" * 64})).save(path)
    ours = settings.model_copy(update={"calibration": path})
    async with run_fake(tmp_path, ours, is_calibrated=False) as running:
        report = (await running.chat(palette=SHORT)).json()["palette"]
    assert not report["calibration"]["valid"]
    assert "other model weights" in report["calibration"]["warnings"][0]


async def test_requests_in_flight_keep_the_calibration_they_began_with(tmp_path, settings):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, settings, backend) as running:
        old, rewards = fake_calibration(), fake_calibration().pilot.rewards
        new = Calibration(PilotSet(rewards + 1.0, VALUES), old.info)
        early = [asyncio.create_task(running.chat(palette=SHORT, seed=i)) for i in range(8)]
        await until(lambda: backend.n_started == 8)
        running.context.aligner.calibration = new
        late = [asyncio.create_task(running.chat(palette=SHORT, seed=i)) for i in range(8)]
        await until(lambda: backend.n_started == 16)
        backend.released.set()
        before = [(await task).json()["palette"] for task in early]
        after = [(await task).json()["palette"] for task in late]
    for reports, one in ((before, old), (after, new)):
        assert {report["calibration"]["id"] for report in reports} == {one.id}
        for report in reports:
            # Both halves are of one calibration: no new multipliers with old levels.
            assert report["expected"]["words"]["level"] == pytest.approx(8.0, abs=1e-5)
            assert report["multipliers"] == reports[0]["multipliers"]
    assert before[0]["multipliers"]["words"] > after[0]["multipliers"]["words"]
