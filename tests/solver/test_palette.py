import copy
import math
import pickle

import numpy as np
import pytest

from solver import Palette, PaletteError, PilotSet, SolverError, UnknownValueError
from tests.solver.problems import gaussian_pilot


@pytest.fixture
def pilot():
    return gaussian_pilot(0, n_prompts=5, n_candidates=8, n_values=3)


def test_each_form_resolves_to_its_level(pilot):
    rewards = pilot.rewards
    std = np.sqrt(rewards.var(axis=1).mean(axis=0))
    forms = {
        '{"quantile": 0.8}': ({"quantile": 0.8}, np.quantile(rewards, 0.8, axis=1).mean(axis=0)),
        "traffic": (
            {"quantile": 0.8, "of": "traffic"},
            np.quantile(rewards.reshape(-1, 3), 0.8, axis=0),
        ),
        "gain": ({"gain": -0.5}, rewards.mean(axis=(0, 1)) - 0.5 * std),
        "keep": ("keep", rewards.mean(axis=(0, 1))),
        "at_least": ({"at_least": 1.5}, np.full(3, 1.5)),
    }
    for wire, level in forms.values():
        resolved = Palette({"v1": wire}).resolve(pilot)
        # rtol: the mean of order statistics is summed in another order than the quantiles
        np.testing.assert_allclose(resolved.lower, [-np.inf, level[1], -np.inf], rtol=1e-12)
        assert np.isposinf(resolved.upper).all()


def test_upper_and_two_sided_targets(pilot):
    palette = Palette({"v0": {"at_most": 2}, "v2": {"between": [1, 3]}})
    resolved = palette.resolve(pilot)
    np.testing.assert_array_equal(resolved.lower, [-np.inf, -np.inf, 1])
    np.testing.assert_array_equal(resolved.upper, [2, np.inf, 3])
    assert resolved.active.tolist() == [0, 2]


def test_a_given_multiplier_is_not_solved(pilot):
    resolved = Palette({"v0": {"multiplier": 2.0}, "v1": "keep"}).resolve(pilot)
    np.testing.assert_array_equal(resolved.fixed, [2.0, np.nan, np.nan])
    assert resolved.active.tolist() == [1]


def test_multipliers_without_a_pilot():
    palette = Palette({"b": {"multiplier": 2}, "a": {"multiplier": -1.5}})
    assert not palette.needs_pilot
    np.testing.assert_array_equal(palette.multipliers(["a", "b", "c"]), [-1.5, 2, 0])
    with pytest.raises(UnknownValueError):
        palette.multipliers(["a"])
    assert Palette({"a": "keep"}).needs_pilot
    with pytest.raises(PaletteError, match="needs a calibration") as caught:
        Palette({"a": "keep"}).multipliers(["a"])
    assert caught.value.param == "targets.a"


def test_the_key_ignores_order_and_spelling():
    one = Palette({"a": {"quantile": 0.8}, "b": "keep"}, floors={"a": 0, "b": 1})
    other = Palette({"b": "keep", "a": {"of": "prompt", "quantile": 0.8}}, {"b": 1.0, "a": 0.0})
    assert one == other
    assert hash(one) == hash(other)
    assert one != Palette({"a": {"quantile": 0.8, "of": "traffic"}, "b": "keep"})
    assert one != Palette(one.targets)
    assert Palette({"a": "keep"}, on_floor="best") == Palette({"a": "keep"})


def test_the_wire_form_returns():
    wire = {
        "targets": {
            "a": {"quantile": 0.8, "of": "traffic"},
            "b": "keep",
            "c": {"between": [1.0, 2.0]},
            "d": {"multiplier": 2.0},
        },
        "floors": {"a": -1.0},
        "on_floor": "best",
    }
    palette = Palette(**wire)
    assert palette.to_dict() == wire
    assert Palette(**palette.to_dict()) == palette
    assert pickle.loads(pickle.dumps(palette)) == palette
    assert copy.deepcopy(palette) == palette
    assert Palette({"a": "keep"}).to_dict() == {"targets": {"a": "keep"}}


def test_a_palette_does_not_change_with_the_callers_dict():
    targets = {"a": {"at_least": 1.0}}
    palette = Palette(targets)
    targets["a"]["at_least"] = 2.0
    assert palette.to_dict() == {"targets": {"a": {"at_least": 1.0}}}
    with pytest.raises(TypeError):
        palette.targets["a"] = "keep"
    with pytest.raises(AttributeError):
        palette.on_floor = "best"


@pytest.mark.parametrize(
    ("wire", "param", "words"),
    [
        ("kepe", "targets.a", "is not a target"),
        (0.8, "targets.a", "not 0.8"),
        (None, "targets.a", "not None"),
        ({}, "targets.a", "no kind of target"),
        ({"quantil": 0.8}, "targets.a", "no kind of target"),
        ({"of": "traffic"}, "targets.a", "no kind of target"),
        ({"quantile": 1.0}, "targets.a.quantile", "outside"),
        ({"quantile": 0}, "targets.a.quantile", "outside"),
        ({"quantile": 80}, "targets.a.quantile", "write 0.8"),
        ({"quantile": True}, "targets.a.quantile", "expected a number"),
        ({"quantile": "0.8"}, "targets.a.quantile", "expected a number"),
        ({"quantile": 0.8, "of": "all"}, "targets.a.of", "prompt"),
        ({"quantile": 0.8, "of": ["traffic"]}, "targets.a.of", "prompt"),
        ({"gain": 1, "of": "traffic"}, "targets.a.of", "unknown key"),
        ({"gain": math.nan}, "targets.a.gain", "not a finite"),
        ({"at_least": math.inf}, "targets.a.at_least", "not a finite"),
        ({"at_least": 10**400}, "targets.a.at_least", "not a finite"),
        ({"at_most": 1e101}, "targets.a.at_most", "not a finite"),
        ({"at_least": 1, "at_most": 2}, "targets.a", "between"),
        ({"gain": 1, "quantile": 0.5}, "targets.a", "two targets"),
        ({"gain": 1, "note": "x"}, "targets.a.note", "unknown key"),
        ({"between": [2, 1]}, "targets.a.between", "write \\[1, 2\\]"),
        ({"between": [1]}, "targets.a.between", "two numbers"),
        ({"between": "12"}, "targets.a.between", "two numbers"),
        ({"between": [1, None]}, "targets.a.between", "expected a number"),
        ({"multiplier": None}, "targets.a.multiplier", "expected a number"),
    ],
)
def test_a_bad_target_names_its_field_and_remedy(wire, param, words):
    with pytest.raises(PaletteError, match=words) as caught:
        Palette({"a": wire})
    assert caught.value.param == param
    assert str(caught.value).startswith(param)


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"targets": ["a"]}, "targets"),
        ({"targets": None}, "targets"),
        ({"targets": {"": "keep"}}, "targets"),
        ({"targets": {" ": "keep"}}, "targets"),
        ({"targets": {1: "keep"}}, "targets"),
        ({"targets": {}, "floors": [1]}, "floors"),
        ({"targets": {}, "floors": {"a": "x"}}, "floors.a"),
        ({"targets": {}, "floors": {"a": math.nan}}, "floors.a"),
        ({"targets": {}, "floors": {"": 1}}, "floors"),
        ({"targets": {}, "on_floor": "serve"}, "on_floor"),
    ],
)
def test_a_bad_palette_names_its_part(arguments, param):
    with pytest.raises(PaletteError) as caught:
        Palette(**arguments)
    assert caught.value.param == param
    assert isinstance(caught.value, SolverError)


def test_an_unknown_value_lists_the_known_and_suggests(pilot):
    with pytest.raises(UnknownValueError, match=r"harmles.*v0, v1, v2") as caught:
        Palette({"harmles": "keep"}).resolve(pilot)
    assert caught.value.param == "targets.harmles"
    named = PilotSet(pilot.rewards, ("harmless", "helpful", "words"))
    with pytest.raises(UnknownValueError, match="Did you mean 'harmless'"):
        Palette({"harmles": "keep"}).resolve(named)
    with pytest.raises(UnknownValueError) as caught:
        Palette({}, floors={"word": 3}).resolve(named)
    assert caught.value.param == "floors.word"


def test_errors_survive_pickling():
    with pytest.raises(PaletteError) as caught:
        Palette({"a": {"quantile": 2}})
    returned = pickle.loads(pickle.dumps(caught.value))
    assert str(returned) == str(caught.value)
    assert returned.param == "targets.a.quantile"


@pytest.mark.parametrize(
    ("wire", "kind"),
    [
        ({"quantile": 0.8, "of": "traffic", "optional": True}, "quantile"),
        ({"keep": True, "optional": True}, "keep"),
        ({"between": [1, 2], "optional": True}, "between"),
        ({"multiplier": 2.0, "optional": True}, "multiplier"),
    ],
)
def test_optional_targets_ask_for_the_same(wire, kind):
    palette = Palette({"a": wire})
    target = palette.parsed["a"]
    assert (target.kind, target.optional) == (kind, True)
    assert palette.targets["a"] == wire
    must = {key: one for key, one in wire.items() if key != "optional"}
    assert palette == Palette({"a": must}), "they are solved once"
    assert Palette({"a": must}).parsed["a"].optional is False
    assert Palette({"a": {**must, "optional": False}}).targets["a"] == (
        "keep" if kind == "keep" else must
    )


@pytest.mark.parametrize(
    ("wire", "param"),
    [
        ({"quantile": 0.8, "optional": 1}, "targets.a.optional"),
        ({"keep": False}, "targets.a.keep"),
        ({"keep": "yes", "optional": True}, "targets.a.keep"),
        ({"optional": True}, "targets.a"),
        ({"keep": True, "at_most": 3}, "targets.a"),
    ],
)
def test_optional_targets_that_are_none(wire, param):
    with pytest.raises(PaletteError) as caught:
        Palette({"a": wire})
    assert caught.value.param == param
