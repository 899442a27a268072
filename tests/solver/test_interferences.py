import json
import math

import numpy as np
import pytest
from scipy.special import digamma

from solver import Palette, PilotError, PilotSet, solve
from solver.information import _kraskov
from solver.interferences import interference
from tests.solver.problems import gaussian_pilot, names


def information(*columns, pooled=False, **options):
    """Estimated information between the first two columns, each (n_prompts, n_candidates)."""
    rewards = np.stack(columns, axis=-1)
    pilot = PilotSet(rewards, names(len(columns)), pooled=pooled)
    return interference(pilot, **options).mutual_information[0, 1]


def gaussian(rng, correlation, shape):
    x, noise = rng.normal(size=(2, *shape))
    return x, correlation * x + np.sqrt(1 - correlation**2) * noise


# information


def test_the_estimator_is_the_published_one():
    # Every distance written out, with strict inequalities; five neighbours.
    x, y = gaussian(np.random.default_rng(0), 0.8, (300,))
    apart = np.abs(x - x[:, None]), np.abs(y - y[:, None])
    radius = np.sort(np.maximum(*apart), axis=1)[:, [5]]
    nearer = [(distance < radius).sum(axis=1) - 1 for distance in apart]
    truth = digamma(5) + digamma(300) - np.mean(digamma(nearer[0] + 1) + digamma(nearer[1] + 1))
    np.testing.assert_allclose(_kraskov(x, y), truth, rtol=1e-12)


@pytest.mark.parametrize("correlation", [0.0, -0.3, 0.6, -0.9, 0.99])
@pytest.mark.parametrize("shape", [(640, 8), (80, 64), (1, 5120)])
def test_information_of_normal_values(correlation, shape):
    # Four standard errors of 0.02, and what 8 candidates a prompt lose at 0.99.
    x, y = gaussian(np.random.default_rng(shape[0]), correlation, shape)
    level = 3 * np.random.default_rng(1).normal(size=(shape[0], 1))
    truth = -0.5 * math.log(1 - correlation**2)
    assert abs(information(x + level, y + level) - truth) < 0.08
    report = interference(PilotSet(np.stack([x, y], axis=-1), names(2)))
    assert abs(report.gaussian_information[0, 1] - truth) < 0.06


def test_four_candidates_lose_little_and_two_much():
    rng = np.random.default_rng(0)
    four, two = (information(*gaussian(rng, 0.9, (5120 // k, k))) for k in (4, 2))
    truth = -0.5 * math.log(1 - 0.81)
    assert truth - 0.15 < four < truth
    assert 0.3 < two < math.log(2)


def test_independent_values_share_nothing():
    rng = np.random.default_rng(0)
    pilot = PilotSet(rng.gumbel(size=(100, 50, 6)), names(6))
    found = interference(pilot).mutual_information
    apart = found[~np.eye(6, dtype=bool)]
    assert np.isnan(np.diag(found)).all()
    assert apart.min() == 0.0  # noise below 0 is cut
    assert apart.max() < 0.06
    assert apart.mean() < 0.01


def test_a_square_is_seen_by_information_alone():
    x = np.random.default_rng(0).normal(size=5000)
    pilot = PilotSet(np.stack([x, x**2], axis=-1), names(2), pooled=True)
    report = interference(pilot)
    assert abs(report.correlation[0, 1]) < 0.05
    assert report.gaussian_information[0, 1] < 0.01
    assert report.mutual_information[0, 1] > 2.0  # infinite in the limit


def test_discrete_values_against_their_exact_information():
    # A sample of exactly these shares, so that the plug-in information is the truth.
    for table in (
        [[400, 100], [100, 400]],
        [[100, 0], [0, 900]],
        [[300, 100, 0], [100, 200, 100], [0, 100, 100]],
        [[100, 200], [200, 400]],
    ):
        counts = 4 * np.array(table)
        a, b = np.indices(counts.shape).reshape(2, -1).repeat(counts.ravel(), axis=1) * 1.0
        share = counts / counts.sum()
        alone = share.sum(axis=1, keepdims=True) * share.sum(axis=0, keepdims=True)
        some = share > 0
        truth = (share[some] * np.log(share[some] / alone[some])).sum()
        assert abs(information(a, b, pooled=True) - truth) < 0.06
        assert abs(information(7 - 2 * b, np.exp(a), pooled=True) - truth) < 0.06


def test_the_prompt_is_not_taken_for_dependence():
    # Counts and spreads that depend on the prompt, independent given the prompt: the deviations
    # tell which prompt it is, and with it the other value's (2.3 and 0.1 nats if left in).
    rng = np.random.default_rng(0)
    share = rng.uniform(0.2, 0.8, size=(2, 80, 1))
    a, b = (rng.random((2, 80, 64)) < share) * 1.0
    assert information(a, b) < 0.08
    spread = np.exp(0.7 * rng.normal(size=(80, 1)))
    assert information(*(spread * rng.normal(size=(2, 80, 64)))) < 0.04
    # The same binary values where they do depend: the mean over prompts of the exact information.
    a = (rng.random((80, 64)) < share[0]) * 1.0
    b = np.where(rng.random((80, 64)) < 0.8, a, (rng.random((80, 64)) < share[1]) * 1.0)
    p, q = share[..., 0]
    joint = np.stack([p * (0.8 + 0.2 * q), p * 0.2 * (1 - q), (1 - p) * 0.2 * q])
    joint = np.concatenate([joint, 1 - joint.sum(axis=0, keepdims=True)]).reshape(2, 2, 80)
    alone = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    truth = (joint * np.log(joint / alone)).sum(axis=(0, 1)).mean()
    assert abs(information(a, b) - truth) < 0.1


def test_information_does_not_depend_on_units():
    rng = np.random.default_rng(0)
    x, y = gaussian(rng, 0.7, (60, 20))
    level = 10 * rng.normal(size=(2, 60, 1))
    found = information(x, y)
    assert information(1000 * x + level[0], 5 - 0.01 * y + level[1]) == pytest.approx(
        found, abs=0.02
    )
    assert information(1000 * x + level[0], 0.01 * y + level[1]) == found
    pooled = information(x.ravel(), y.ravel(), pooled=True)
    assert information(np.exp(x.ravel()), np.cbrt(y.ravel()), pooled=True) == pooled
    assert information(x[:1], y[:1]) == information(np.exp(x[:1]), y[:1] ** 3)


def test_offsets_of_prompts_do_not_order_ties():
    # Every prompt has the same answers, so equal deviations of all prompts are ties.
    words = np.tile([3.0, 5.0, 5.0, 8.0, 9.0, 9.0, 9.0], (60, 1))
    other = np.tile([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0], (60, 1))
    prompt = np.arange(60.0)[:, None]
    found = information(words, other)
    assert information(words + 0.1 * prompt, other - prompt / 3) == found
    assert information(words + 1e11 * prompt, other - 1e11 * prompt) == found


def test_information_of_copies():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 20))
    assert information(x, 2 * x + rng.normal(size=(50, 1))) == math.inf
    assert information(x, -x) == math.inf
    assert information(x.ravel(), np.exp(-x.ravel()), pooled=True) == math.inf
    # Also with one level that repeats; a copy of few levels is worth its entropy.
    partly = np.maximum(x.ravel(), -0.5)
    assert information(partly, np.exp(partly), pooled=True) == math.inf
    binary = np.tile([0.0, 1.0], 2000)
    assert information(binary, binary, pooled=True) == pytest.approx(math.log(2), abs=0.05)


def test_the_seed_decides_the_draw():
    x, y = gaussian(np.random.default_rng(0), 0.5, (100, 20))
    few = [information(x, y, max_samples=200, seed=seed) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    assert information(x, y) != few[0]


# inflation and collinear combinations


def test_inflation_is_that_of_the_regression():
    pilot = gaussian_pilot(0, n_values=5, correlation=0.6)
    excess = (pilot.rewards - pilot.rewards.mean(axis=1, keepdims=True)).reshape(-1, 5)
    for i, found in enumerate(interference(pilot).inflation):
        others = np.delete(excess, i, axis=1)
        fit = others @ np.linalg.lstsq(others, excess[:, i], rcond=None)[0]
        unexplained = ((excess[:, i] - fit) ** 2).sum() / (excess[:, i] ** 2).sum()
        np.testing.assert_allclose(found, 1 / unexplained, rtol=1e-9)


def test_inflation_is_the_slope_of_the_multipliers():
    # ∂λ_i/∂c_i at the base with the other levels kept, over the same for the value alone, N = ∞.
    pilot = gaussian_pilot(3, n_prompts=200, n_candidates=32, correlation=0.8)

    def multiplier(i, step, others):
        levels = pilot.base.copy()
        levels[i] += step * pilot.scale[i]
        asked = {
            name: {"between": [level, level]}
            for j, (name, level) in enumerate(zip(pilot.values, levels, strict=True))
            if others or j == i
        }
        return solve(Palette(asked), pilot, math.inf).multipliers[i]

    for i, found in enumerate(interference(pilot).inflation):
        slopes = [
            multiplier(i, 1e-4, others) - multiplier(i, -1e-4, others) for others in (True, False)
        ]
        np.testing.assert_allclose(found, slopes[0] / slopes[1], rtol=1e-5)


def test_price_is_the_slope_along_the_combination():
    rng = np.random.default_rng(0)
    x, y = gaussian(rng, 0.97, (100, 32))
    pilot = PilotSet(np.stack([x, y], axis=-1) * [1.0, 5.0], ("x", "y"))
    (found,) = interference(pilot).collinear
    direction = np.array([found.coefficients["x"], found.coefficients["y"]])
    levels = pilot.base + 1e-4 * direction * pilot.scale
    asked = {name: {"between": [c, c]} for name, c in zip("xy", levels, strict=True)}
    solution = solve(Palette(asked), pilot, math.inf)
    standardised = solution.multipliers * pilot.scale
    np.testing.assert_allclose(standardised, found.price * 1e-4 * direction, rtol=1e-3)
    np.testing.assert_allclose(solution.kl, 0.5 * found.price * 1e-8, rtol=1e-2)


def test_a_collinear_triple():
    rng = np.random.default_rng(0)
    a, b, other = rng.normal(size=(3, 50, 40))
    pilot = PilotSet(np.stack([a, other, b, a + b], axis=-1), ("a", "other", "b", "sum"))
    report = interference(pilot)
    (found,) = report.collinear
    scale = dict(zip(pilot.values, pilot.scale, strict=True))
    truth = np.array([scale["sum"], -scale["a"], -scale["b"]])
    coefficients = [found.coefficients[name] for name in ("sum", "a", "b")]
    np.testing.assert_allclose(coefficients, truth / np.linalg.norm(truth), rtol=1e-6)
    assert set(found.coefficients) == {"sum", "a", "b"}
    assert (found.eigenvalue, found.price) == (0.0, math.inf)
    assert found.sentence.startswith("sum moves with 0.")
    assert "no multipliers pull them apart" in found.sentence
    assert report.condition_number == math.inf
    assert np.isinf(report.inflation[[0, 2, 3]]).all()
    assert report.inflation[1] < 1.01


def test_a_near_collinear_pair_in_words():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(100, 50, 4))
    rewards[..., 2] = -rewards[..., 0] + 0.2 * rewards[..., 2]
    pilot = PilotSet(rewards, ("kind", "short", "rude", "true"))
    report = interference(pilot)
    (found,) = report.collinear
    assert set(found.coefficients) == {"kind", "rude"}
    left = 1 - abs(report.correlation[0, 2])
    np.testing.assert_allclose(list(found.coefficients.values()), np.sqrt(0.5))
    np.testing.assert_allclose([found.eigenvalue, 1 / found.price], left)
    assert found.sentence.startswith("kind and rude move against each other, to within 2 %")
    assert "take 51 times the multipliers" in found.sentence
    assert interference(pilot, threshold=0.9 * left).collinear == ()
    spectrum = np.linalg.eigvalsh(np.corrcoef(pilot.rewards.reshape(-1, 4).T))
    np.testing.assert_allclose(report.condition_number, spectrum[-1] / spectrum[0], rtol=0.05)


def test_a_loose_pair_does_not_hide_a_tight_triple():
    rng = np.random.default_rng(0)
    a, noise, rest = rng.normal(size=(3, 50, 40))
    b = a + 0.25 * noise
    pilot = PilotSet(np.stack([a, b, noise + 0.05 * rest], axis=-1), ("a", "b", "c"))
    tight, *looser = interference(pilot).collinear
    assert set(tight.coefficients) == {"a", "b", "c"}
    eigenvalues = np.linalg.eigvalsh(pilot.correlation)
    np.testing.assert_allclose(tight.eigenvalue, eigenvalues[0], rtol=1e-9)
    assert not looser  # a or b is taken out with it
    pair = 1 - pilot.correlation[0, 1]
    assert tight.eigenvalue < 0.1 * pair < 0.1 * 0.05


def test_combinations_that_share_an_eigenvalue_are_told_apart():
    rng = np.random.default_rng(0)
    a, b, c, d = rng.normal(size=(4, 50, 20))
    columns = {"a": a, "b": b, "a2": 2 * a, "b2": -b, "a3": a, "c": c, "d": d, "cd": c - d}
    pilot = PilotSet(np.stack(list(columns.values()), axis=-1), tuple(columns))
    report = interference(pilot)
    found = [frozenset(item.coefficients) for item in report.collinear]
    assert len(found) == 4  # as many as there are dimensions without variance
    assert frozenset({"b", "b2"}) in found
    assert frozenset({"c", "d", "cd"}) in found
    assert sum(pair < {"a", "a2", "a3"} for pair in found) == 2
    assert np.isinf(report.inflation).all()
    excess = (pilot.rewards - pilot.rewards.mean(axis=1, keepdims=True)) / pilot.scale
    for item in report.collinear:
        weights = [item.coefficients.get(name, 0.0) for name in pilot.values]
        assert (excess @ weights).std() < 1e-6
        assert np.linalg.norm(weights) == pytest.approx(1.0)


# every pilot set


def shapes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 20, 1))
    yield "one value", PilotSet(x, names(1))
    yield "pool", PilotSet(rng.normal(size=(300, 3)), names(3), pooled=True)
    yield "one prompt", PilotSet(rng.normal(size=(1, 30, 3)), names(3))
    yield "one candidate", PilotSet(rng.normal(size=(30, 1, 3)), names(3))
    yield "one sample", PilotSet(rng.normal(size=(1, 1, 2)), names(2))
    yield "three samples", PilotSet(rng.normal(size=(1, 3, 2)), names(2))
    yield "constant", PilotSet(np.concatenate([x, 0 * x + 7, -x], axis=2), names(3))
    yield "nothing varies", PilotSet(np.ones((4, 5, 2)), names(2))
    yield "large", PilotSet(1e80 * rng.normal(size=(4, 9, 2)) + 1e84, names(2))


@pytest.mark.parametrize(("name", "pilot"), list(shapes()))
def test_every_pilot_set_has_a_report(name, pilot):
    report = interference(pilot)
    m = pilot.n_values
    assert report.correlation.shape == report.mutual_information.shape == (m, m)
    assert report.inflation.shape == (m,)
    assert (report.inflation >= 1 - 1e-12).all()
    assert report.condition_number >= 1.0
    wire = report.to_dict()
    assert json.loads(json.dumps(wire, allow_nan=False)) == wire
    assert wire["mutual_information"]["v0"]["v0"] is None
    assert wire["constant"] == [v for v, c in zip(names(m), pilot.is_constant, strict=True) if c]


def test_a_constant_value_is_named_and_interferes_with_none():
    report = interference(dict(shapes())["constant"])
    assert report.constant == ("v1",)
    assert report.inflation.tolist() == [math.inf] * 3
    assert report.mutual_information[1, [0, 2]].tolist() == [0.0, 0.0]
    assert report.gaussian_information[1, [0, 2]].tolist() == [0.0, 0.0]
    assert report.gaussian_information[0, 2] == report.mutual_information[0, 2] == math.inf
    (found,) = report.collinear
    assert found.sentence.startswith("v0 and v2 move against each other: no multipliers")
    wire = report.to_dict()
    assert wire["collinear"][0]["price"] is None
    assert wire["mutual_information"]["v0"] == {"v0": None, "v1": 0.0, "v2": None}


def test_too_few_samples_give_no_information():
    assert np.isnan(interference(dict(shapes())["three samples"]).mutual_information).all()


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.0}, {"threshold": 1.0}, {"threshold": math.nan}, {"max_samples": 49},
     {"max_samples": 60.0}, {"seed": -1}, {"seed": True}],
)  # fmt: skip
def test_options_have_limits(options):
    with pytest.raises(PilotError, match=next(iter(options))):
        interference(gaussian_pilot(0), **options)
