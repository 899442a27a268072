"""What a caller does wrong: an error of this package that names the quantity and the remedy."""

import math

import numpy as np
import pytest

from solver import (
    Palette,
    PaletteError,
    PilotError,
    PilotSet,
    SolutionCache,
    SolverError,
    min_candidates,
    repair,
    solve,
)
from tests.solver.problems import gaussian_pilot, names

PALETTE = Palette({"v0": {"gain": 0.3}})
FAR = Palette({"v0": {"gain": 9.0}})


@pytest.fixture(scope="module")
def pilot():
    return gaussian_pilot(0)


@pytest.mark.parametrize("count", ["8", None, [8], math.nan, -math.inf, 0, 2.5, True, 17])
def test_candidates(pilot, count):
    with pytest.raises(PilotError, match="candidates"):
        solve(PALETTE, pilot, count)
    with pytest.raises(PilotError, match="candidates"):
        SolutionCache().solve(PALETTE, pilot, count if not isinstance(count, list) else "8")


@pytest.mark.parametrize("name", ["ridge", "max_kl"])
@pytest.mark.parametrize("number", ["1", math.nan, math.inf, -1.0, True])
def test_real_options(pilot, name, number):
    with pytest.raises(PaletteError, match=name) as caught:
        solve(PALETTE, pilot, 8, **{name: number})
    assert caught.value.param == name


@pytest.mark.parametrize("number", [0, 1.5, math.nan, math.inf, None, "9", True])
def test_max_iterations(pilot, number):
    with pytest.raises(PaletteError, match=r"max_iterations: .* is not a whole number from 1 up"):
        solve(PALETTE, pilot, 8, max_iterations=number)


@pytest.mark.parametrize("number", [0, 1.5, math.nan, "9", True])
def test_upper(pilot, number):
    with pytest.raises(PaletteError, match="upper"):
        min_candidates(PALETTE, pilot, upper=number)


@pytest.mark.parametrize("number", [0, -1, 2.5, "9", True, math.nan])
def test_groups(pilot, number):
    with pytest.raises(PilotError, match=r"groups: .* leave it out for all data"):
        solve(PALETTE, pilot, 8, groups=number)


@pytest.mark.parametrize("number", [-1, 2.5, "9", True, None])
def test_seed(pilot, number):
    with pytest.raises(PilotError, match="seed"):
        solve(PALETTE, pilot, 8, seed=number)


def test_whole_numbers_of_numpy_are_whole_numbers(pilot):
    plain = solve(PALETTE, pilot, 8, groups=40, seed=1, max_iterations=50)
    same = solve(
        PALETTE,
        pilot,
        np.int64(8),
        groups=np.int32(40),
        seed=np.uint8(1),
        max_iterations=np.int8(50),
    )
    np.testing.assert_array_equal(plain.multipliers, same.multipliers)
    assert same.to_dict()["candidates"] == 8


@pytest.mark.parametrize(
    ("start", "told"),
    [
        ("a", "no array of numbers"),
        ([1.0, 2.0], "shape"),
        ([[1.0, 2.0], [3.0]], "no array of numbers"),
    ],
)
def test_warm_start(pilot, start, told):
    with pytest.raises(SolverError, match=f"warm_start: {told}.* v0, v1, v2"):
        solve(PALETTE, pilot, 8, warm_start=start)


def test_a_warm_start_of_other_values(pilot):
    moved = PilotSet(pilot.rewards[..., ::-1], pilot.values[::-1])
    with pytest.raises(SolverError, match=r"warm_start: of v2, v1, v0, where .* v0, v1, v2"):
        solve(PALETTE, pilot, 8, warm_start=solve(PALETTE, moved, 8))


def test_a_palette_and_a_pilot_set_are_made_first(pilot):
    for wrong in (({"v0": "keep"}, pilot), (PALETTE, pilot.rewards)):
        with pytest.raises(SolverError, match="build them first"):
            solve(*wrong, 8)


@pytest.mark.parametrize("wrong", [[3], [None], ["v0", "v0"], ["v9"]])
def test_priorities(pilot, wrong):
    with pytest.raises(PaletteError, match=r"repair\.priorities"):
        repair(FAR, pilot, 8, "greedy", priorities=wrong)


@pytest.mark.parametrize("number", [0, None, "4", math.nan, 2.5])
def test_cache_entries(number):
    with pytest.raises(PaletteError, match="max_entries"):
        SolutionCache(number)


@pytest.mark.parametrize("values", [None, 3, "v0", [], ["v0", "v0", "v1"], ["", "a", "b"]])
def test_value_names(pilot, values):
    with pytest.raises(PilotError, match="values: "):
        PilotSet(pilot.rewards, values)


@pytest.mark.parametrize(
    "rewards",
    [
        np.full((2, 2, 3), 1 + 2j),
        np.ma.masked_array(np.ones((2, 2, 3)), mask=np.zeros((2, 2, 3))),
        [[[1.0, 2.0, "three"]]],
    ],
)
def test_rewards_of_other_kinds(rewards):
    with pytest.raises(PilotError, match="not an array of numbers"):
        PilotSet(rewards, names(3))


def test_values_that_differ_between_palette_and_pilot(pilot):
    with pytest.raises(PaletteError, match="known values are v0, v1, v2"):
        solve(Palette({"v00": "keep"}), pilot, 8)
