"""Problems with known answers, and an oracle that shares no code with the solver."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, sparse

from solver import Palette, PilotSet

DATA_NAME = "llama2-7b-chat.anthropic-harmless.rewards.json"


def names(n_values):
    return tuple(f"v{i}" for i in range(n_values))


def gaussian_pilot(seed, n_prompts=40, n_candidates=16, n_values=3, correlation=0.2):
    """Correlated rewards with a level of its own for each prompt, in uneven units."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.cholesky((1 - correlation) * np.eye(n_values) + correlation)
    rewards = rng.normal(size=(n_prompts, n_candidates, n_values)) @ mix.T
    rewards += rng.normal(size=(n_prompts, 1, n_values))
    units = np.geomspace(0.5, 4.0, n_values)
    return PilotSet(rewards * units + np.linspace(-1, 2, n_values), names(n_values))


def two_point_pilot(share, n_prompts=1, n_candidates=10, low=0.0, high=1.0):
    """Every prompt has the same share of answers with the high reward."""
    n_high = round(share * n_candidates)
    column = np.repeat([high, low], [n_high, n_candidates - n_high])
    return PilotSet(np.broadcast_to(column[:, None], (n_prompts, n_candidates, 1)), names(1))


def at_least(levels):
    return Palette({f"v{i}": {"at_least": float(level)} for i, level in enumerate(levels)})


def random_choice_levels(rewards, rng, sharpness):
    """Levels of a random choice in each group: achievable by construction, (n_values,)."""
    noise = rng.normal(size=rewards.shape[:2]) * sharpness
    noise += rewards @ rng.exponential(size=rewards.shape[2]) * sharpness
    weights = np.exp(noise - noise.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("gn,gnm->m", weights, rewards) / len(rewards)


def support(rewards, direction):
    """h_N(u), written the plain way."""
    return float((rewards @ direction).max(axis=1).mean())


def explicit_bounds(rewards, lower, upper, unit, allowed=None):
    """What the explicit linear programmes below share: one variable for every candidate.

    rewards: (n_groups, N, m); lower, upper: (m,), infinite for none; unit: (m,). Returns the
    constraints side·(expected reward) >= bound in standardised units.
    """
    n_groups, n, m = rewards.shape
    flat = rewards.reshape(-1, m) / n_groups / unit
    low, high = np.flatnonzero(np.isfinite(lower)), np.flatnonzero(np.isfinite(upper))
    served = np.concatenate([flat[:, low], -flat[:, high]], axis=1).T
    bound = np.concatenate([(lower / unit)[low], -(upper / unit)[high]])
    picks = sparse.kron(sparse.eye(n_groups), np.ones((1, n)))
    ceiling = np.ones(n_groups * n) if allowed is None else allowed.reshape(-1).astype(float)
    return served, bound, picks, [(0.0, top) for top in ceiling]


def explicit_reach(served, picks, start, step, limits, ceilings):
    """Largest z within limits with start + z·step achievable."""
    n_groups, n = picks.shape
    result = optimize.linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.hstack([-served, step[:, None]]),
        b_ub=-start,
        A_eq=sparse.hstack([picks, sparse.csr_matrix((n_groups, 1))]),
        b_eq=np.ones(n_groups),
        bounds=[*ceilings, limits],
        method="highs",
    )
    assert result.success, result.message
    return float(result.x[-1])


def explicit_margin(rewards, lower, upper, unit, allowed=None):
    """By how much all bounds can be tightened at once, standardised."""
    served, bound, picks, ceilings = explicit_bounds(rewards, lower, upper, unit, allowed)
    return explicit_reach(served, picks, bound, np.ones(len(bound)), (None, None), ceilings)


def explicit_fraction(rewards, start, lower, upper, unit, limit, allowed=None):
    """Largest ρ <= limit such that the palette a share ρ of the way from start is achievable."""
    served, bound, picks, ceilings = explicit_bounds(rewards, lower, upper, unit, allowed)
    low, high = np.isfinite(lower), np.isfinite(upper)
    begin = np.concatenate([(start / unit)[low], -(start / unit)[high]])
    return explicit_reach(served, picks, begin, bound - begin, (0, limit), ceilings)


@pytest.fixture(scope="session")
def published_pilot():
    """The 2,312 pilot answers published with MAP, where they are at hand."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("PALETTE_SHARED_DATA", root.parent / "shared" / "data"))
    path = folder / DATA_NAME
    if not path.exists():
        pytest.skip(f"{path} is absent; set PALETTE_SHARED_DATA to the folder that holds it")
    return PilotSet.load(path)
