"""Does what is promised on the pilot set hold on prompts and candidates never seen?"""

import math

import numpy as np
import pytest

from solver import Palette, PilotSet, Status, solve
from solver.tilt import draw, log_weights
from tests.solver.problems import names


def model(rng, n_prompts, n_candidates):
    """A base model: prompts differ in level and spread, rewards are skewed and correlated."""
    mix = np.array([[1.0, 0.0, 0.0], [-0.4, 0.9, 0.0], [0.3, 0.2, 0.9]])
    noise = rng.normal(size=(n_prompts, n_candidates, 3)) @ mix.T
    noise[..., 2] = np.exp(0.5 * noise[..., 2])
    spread = rng.uniform(0.5, 1.5, size=(n_prompts, 1, 1))
    return rng.normal(size=(n_prompts, 1, 3)) + spread * noise


def served_levels(multipliers, rewards):
    """Expected rewards of each group's choice, (n_groups, n_values)."""
    logits = rewards @ multipliers
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("gn,gnm->gm", weights, rewards)


@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_prompts_meet_the_palette_within_its_error(n, seed):
    rng = np.random.default_rng([seed, n])
    pilot = PilotSet(model(rng, 300, 64), names(3))
    held_out = model(rng, 4000, n)
    gain = 0.35 if n == 4 else 0.5
    solution = solve(Palette({name: {"gain": gain} for name in names(3)}), pilot, n)
    assert solution.status is Status.OPTIMAL
    levels = served_levels(solution.multipliers, held_out)
    error = np.hypot(solution.stderr, levels.std(axis=0) / math.sqrt(len(levels)))
    asked = np.array([solution.targets[name] for name in pilot.values])
    # 18 comparisons in all: 3.5 standard errors fail by chance once in a hundred sets of seeds
    assert (np.abs(levels.mean(axis=0) - asked) < 3.5 * error).all()


def test_multipliers_for_infinitely_many_candidates_fall_short_with_eight():
    rng = np.random.default_rng(0)
    pilot = PilotSet(model(rng, 300, 64), names(3))
    palette = Palette({name: {"gain": 0.5} for name in names(3)})
    held_out = model(rng, 4000, 8)
    gains = {}
    for n in (8, math.inf):
        multipliers = solve(palette, pilot, n).multipliers
        above = served_levels(multipliers, held_out) - held_out.mean(axis=1)
        gains[n] = above.mean(axis=0) / pilot.within_std
    assert gains[8].min() > 0.5 - 0.03
    assert gains[math.inf].min() < 0.5 - 0.06


def test_standard_errors_cover():
    """The true level at the solved multipliers lies within two errors of the promise, 95 in 100."""
    rng = np.random.default_rng(0)
    truth = model(rng, 20_000, 8)
    asked = truth.mean(axis=(0, 1)) + 0.3 * truth.std(axis=1).mean(axis=0)
    palette = Palette({f"v{i}": {"at_least": float(asked[i])} for i in range(3)})
    covered = []
    for _ in range(150):
        pilot = PilotSet(model(rng, 60, 16), names(3))
        solution = solve(palette, pilot, 8)
        if solution.status is not Status.OPTIMAL:
            continue
        actual = served_levels(solution.multipliers, truth[:4000]).mean(axis=0)
        actual += truth.mean(axis=(0, 1)) - truth[:4000].mean(axis=(0, 1))
        tight = solution.multipliers > 0
        covered += (np.abs(actual - solution.expected) < 1.96 * solution.stderr)[tight].tolist()
    assert len(covered) > 300
    # 150 pilot sets with dependent values: two binomial errors of about 0.02 on each side
    assert 0.89 < np.mean(covered) < 0.99


def test_choices_drawn_one_by_one_deliver_the_expected_levels():
    rng = np.random.default_rng(3)
    pilot = PilotSet(model(rng, 200, 32), names(3))
    solution = solve(Palette({"v0": {"gain": 0.5}, "v1": "keep"}), pilot, 8)
    held_out = model(rng, 3000, 8)
    chosen = np.array(
        [
            rewards[draw(log_weights(solution.multipliers, rewards), seed)[0]]
            for seed, rewards in enumerate(held_out)
        ]
    )
    error = np.hypot(solution.stderr, chosen.std(axis=0) / math.sqrt(3000))
    assert (np.abs(chosen.mean(axis=0) - solution.expected) < 4 * error).all()
