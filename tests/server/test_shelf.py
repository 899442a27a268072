"""Calibrations side by side: which one a request gets, by its nearness or by name."""

from __future__ import annotations

import itertools
import random
from datetime import timedelta

import pytest

from rewards import Message
from server.backends.base import SamplingSettings
from server.calibration import NO_SYSTEM, system_of
from server.shelf import Shelf, UnknownCalibrationError
from server.shelf_files import Held
from tests.server.calibrations_made import (
    DAY,
    LEGAL,
    MODEL,
    PALETTE,
    SUPPORT,
    asked,
    hashed,
    keep,
    made,
    shelf_of,
)
from tests.server.conftest import run_fake

# the table: two calibrations, four temperatures, two system prompts


PLAIN = made(1, temperature=1.0)
WARM = made(2, temperature=0.7, systems={hashed(SUPPORT): 16})

TABLE = [
    # temperature, system prompt -> the one used, words of its warnings
    (1.0, None, PLAIN, []),
    (1.0, SUPPORT, WARM, ["temperature=1"]),
    (0.7, None, PLAIN, ["temperature=0.7"]),
    (0.7, SUPPORT, WARM, []),
    (0.5, None, PLAIN, ["temperature=0.5"]),
    (0.5, SUPPORT, WARM, ["temperature=0.5"]),
    (1.5, None, PLAIN, ["temperature=1.5"]),
    (1.5, SUPPORT, WARM, ["temperature=1.5"]),
    # A system prompt that none was made with: the nearest temperature, and both faults are told.
    (1.0, LEGAL, PLAIN, ["this system prompt"]),
    (0.7, LEGAL, WARM, ["this system prompt"]),
    (0.5, LEGAL, WARM, ["temperature=0.5", "this system prompt"]),
]


@pytest.mark.parametrize("order", [1, -1])
async def test_each_request_gets_the_right_one_or_is_told_that_none_fits(tmp_path, settings, order):
    keep(settings, *(PLAIN, WARM)[::order])
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        for temperature, system, wanted, warned in TABLE:
            answer = await running.chat(
                messages=asked(system), temperature=temperature, palette=PALETTE, seed=1
            )
            report = answer.json()["palette"]
            told = report["calibration"]
            where = (temperature, system)
            assert told["id"] == wanted.id, where
            assert told["valid"] == (not warned), where
            assert len(told["warnings"]) == len(warned), where
            for warning, words in zip(told["warnings"], warned, strict=True):
                assert words in warning, where
            # The promise is of that one, not only the label.
            level = wanted.pilot.base[0] + 0.2 * wanted.pilot.within_std[0]
            assert report["targets"]["words"] == pytest.approx(level), where


def test_four_calibrations_leave_nothing_uncovered():
    grid = list(itertools.product((1.0, 0.7), (None, SUPPORT)))
    ones = {
        point: made(seed, temperature=point[0], systems={hashed(point[1]): 16})
        for seed, point in enumerate(grid)
    }
    shelf = shelf_of(*ones.values())
    for point, one in ones.items():
        found = shelf.choose(SamplingSettings(temperature=point[0]), asked(point[1]))
        assert found is one
        assert found.distance(SamplingSettings(temperature=point[0]), hashed(point[1])) == 0


# distance


def test_distance_is_zero_exactly_where_nothing_is_warned_of():
    rng = random.Random(0)
    n_covered = 0
    for _ in range(2000):
        one = made(
            temperature=rng.choice([0.7, 1.0]), top_p=rng.choice([0.9, 1.0]),
            top_k=rng.choice([0, 1, 50]), max_tokens=rng.choice([16, 21, 512]),
            truncated_share=rng.choice([0.0, 0.05]),
            systems=rng.choice([None, {NO_SYSTEM: 16}, {hashed(SUPPORT): 9, NO_SYSTEM: 7}]),
        )  # fmt: skip
        sampling = SamplingSettings(
            temperature=rng.choice([0.7, 1.0]), top_p=rng.choice([0.9, 1.0]),
            top_k=rng.choice([0, 1, 50]), max_tokens=rng.choice([16, 20, 21, 512, 600]),
        )  # fmt: skip
        system = rng.choice([NO_SYSTEM, hashed(SUPPORT), hashed(LEGAL)])
        warnings = one.warnings_for(MODEL, one.info.rewards_fingerprint, sampling, system)
        distance = one.distance(sampling, system)
        assert (distance == 0) == (not warnings), (warnings, distance)
        n_covered += not warnings
    assert n_covered > 20


@pytest.mark.parametrize(
    ("nearer", "farther"),
    [
        ({"temperature": 0.9}, {"temperature": 0.7}),
        ({"top_p": 0.95}, {"top_p": 0.5}),
        ({"top_k": 50}, {"top_k": 2}),  # 50 of all tokens leave nearly what all of them do
        ({"temperature": 0.5}, {"systems": {hashed(LEGAL): 16}}),
        ({"max_tokens": 500, "truncated_share": 0.5}, {"max_tokens": 16, "truncated_share": 0.5}),
    ],
)
def test_nearest(nearer, farther):
    near, far = made(1, **nearer), made(2, **farther)
    for shelf in (shelf_of(near, far), shelf_of(far, near)):
        assert shelf.choose(SamplingSettings(), asked()) is near


def test_system_prompts_are_told_apart_by_their_texts():
    two = [Message(role="system", content=text) for text in ("a", "b")]
    one = [Message(role="system", content="ab")]
    assert system_of(()) == system_of(asked()) == NO_SYSTEM
    assert len({system_of(two), system_of(one), hashed(SUPPORT), NO_SYSTEM}) == 4
    assert system_of([*asked(SUPPORT), Message(role="user", content="And?")]) == hashed(SUPPORT)


@pytest.mark.parametrize(
    ("systems", "system", "told"),
    [
        ({NO_SYSTEM: 16}, SUPPORT, "made without one"),
        ({hashed(LEGAL): 16}, SUPPORT, "made with others"),
        ({hashed(LEGAL): 8, NO_SYSTEM: 8}, SUPPORT, "made with others"),
        ({hashed(LEGAL): 16}, None, "this conversation has none"),
        (None, SUPPORT, "before system prompts were recorded"),
        (None, None, None),
        ({hashed(LEGAL): 1, NO_SYSTEM: 15}, LEGAL, None),
    ],
)
def test_what_is_told_of_a_system_prompt(systems, system, told):
    one = made(systems=systems)
    warnings = one.warnings_for(
        MODEL, one.info.rewards_fingerprint, SamplingSettings(), hashed(system)
    )
    assert len(warnings) == (told is not None)
    assert all(told in warning for warning in warnings)


# among several that cover a request


def test_one_for_this_very_system_prompt_before_a_mixture_with_it():
    pure = made(1, systems={hashed(SUPPORT): 16}, created=DAY)
    mixed = made(2, systems={hashed(SUPPORT): 4, NO_SYSTEM: 12}, created=DAY + timedelta(1))
    shelf = Shelf([Held(mixed, None, "named"), Held(pure, None, "shipped")])
    assert shelf.choose(SamplingSettings(), asked(SUPPORT)) is pure
    assert shelf.choose(SamplingSettings(), asked()) is mixed


def test_named_before_kept_before_shipped_then_the_newest():
    ones = [made(seed, created=DAY + timedelta(seed)) for seed in range(4)]
    held = [
        Held(ones[3], None, "shipped"), Held(ones[1], None, "kept"), Held(ones[2], None, "kept"),
        Held(ones[0], None, "named"),
    ]  # fmt: skip
    for wanted in (ones[0], ones[2], ones[1], ones[3]):
        assert Shelf(held).choose(SamplingSettings(), asked()) is wanted
        held = [one for one in held if one.calibration is not wanted]


def test_what_the_operator_named_comes_before_the_nearest_but_not_before_what_covers():
    named, near, fits = made(1, temperature=0.2), made(2, temperature=0.9), made(3)
    shelf = Shelf([Held(near), Held(named, None, "named")])
    assert shelf.choose(SamplingSettings(), asked()) is named
    shelf = Shelf([Held(near), Held(named, None, "named"), Held(fits)])
    assert shelf.choose(SamplingSettings(), asked()) is fits


def test_of_another_model_covers_nothing():
    named, fits = made(1, model_fingerprint="0" * 64), made(2)
    held = [Held(named, None, "named"), Held(fits)]
    shelf = Shelf(held, model_fingerprint=MODEL)
    assert shelf.choose(SamplingSettings(), asked()) is fits


# by name


def test_by_name_and_by_id():
    ones = [made(1, name="support"), made(2, name="legal", temperature=0.7), made(3)]
    shelf = shelf_of(*ones)
    for one in ones:
        assert shelf.choose(SamplingSettings(), asked(), one.id) is one
    assert shelf.choose(SamplingSettings(), asked(), "legal") is ones[1]


def test_of_several_with_one_name_the_one_that_covers_the_request():
    ones = [made(seed, name="support", temperature=t) for seed, t in enumerate((1.0, 0.7))]
    shelf = shelf_of(*ones, made(3, temperature=0.5))
    for one in ones:
        sampling = SamplingSettings(temperature=one.info.temperature)
        assert shelf.choose(sampling, asked(), "support") is one
    assert shelf.choose(SamplingSettings(temperature=0.5), asked(), "support") is ones[1]


@pytest.mark.parametrize("name", ["", "suport", "SUPPORT", "supp"])
def test_unknown_name(name):
    one = made(name="support")
    with pytest.raises(UnknownCalibrationError, match=f"support .{one.id}"):
        shelf_of(one).choose(SamplingSettings(), asked(), name)
    with pytest.raises(UnknownCalibrationError, match="none yet"):
        Shelf().choose(SamplingSettings(), asked(), name)
