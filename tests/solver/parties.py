"""Parties that want different things, and their optimum by a programme of its own."""

import functools
import math

import numpy as np
from scipy import optimize

from solver import Palette
from solver.negotiation import Party, negotiate
from tests.solver.problems import gaussian_pilot

N = 6


class Explicit:
    """The parties' problem with a weight for every candidate; nothing here is the solver's.

    Variables: the weights of all candidates, the levels, each party's share, and t. `asked` holds
    a (lower, upper) pair of arrays for each party, reward units.
    """

    def __init__(self, rewards, asked, weights):
        n_groups, n, m = rewards.shape
        self.m, self.weights = m, np.asarray(weights, dtype=float)
        self.size, self.parties = n_groups * n, len(asked)
        base = rewards.mean(axis=(0, 1))
        width = self.size + m + self.parties + 1
        picks = np.zeros((n_groups, width))
        picks[:, : self.size] = np.kron(np.eye(n_groups), np.ones(n))
        levels = np.zeros((m, width))
        levels[:, : self.size] = rewards.reshape(-1, m).T / n_groups
        levels[:, self.size : self.size + m] = -np.eye(m)
        self.equal = np.vstack([picks, levels]), np.append(np.ones(n_groups), np.zeros(m))
        rows, ends, self.wishing = [], [], set()
        for party, (lower, upper) in enumerate(asked):
            for side, bound in ((1, lower), (-1, upper)):
                for i in np.flatnonzero(np.isfinite(bound)):
                    row = np.zeros(width)
                    row[self.size + i] = -side
                    way = side * (bound[i] - base[i])
                    if way > 1e-9:
                        row[self.share(party)] = way
                        rows.append(row)
                        ends.append(-side * base[i])
                        self.wishing.add(party)
                    else:
                        rows.append(row)
                        ends.append(-side * bound[i] + 1e-12)
        self.rows, self.ends = np.array(rows), np.array(ends)

    def share(self, party):
        return self.size + self.m + party

    def most(self, goal, share_at_least, rate=None):
        """Largest value of one variable with given least shares and, by `rate`, share >= t·rate."""
        width = self.rows.shape[1]
        rows, ends = self.rows, self.ends
        if rate is not None:
            extra = np.zeros((self.parties, width))
            extra[np.arange(self.parties), [self.share(p) for p in range(self.parties)]] = -1
            extra[:, -1] = rate
            rows, ends = np.vstack([rows, extra]), np.append(ends, np.zeros(self.parties))
        cost = np.zeros(width)
        cost[goal] = -1
        bounds = [(0, None)] * self.size + [(None, None)] * self.m
        bounds += [(low - 1e-10, 1) for low in share_at_least] + [(0, None)]
        found = optimize.linprog(
            cost, rows, ends, *self.equal, bounds=bounds, method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )  # fmt: skip
        assert found.success, found.message
        return float(-found.fun)

    def leximin(self):
        share = np.array([0.0 if p in self.wishing else 1.0 for p in range(self.parties)])
        is_open = share == 0.0
        while is_open.any():
            t = self.most(-1, share, np.where(is_open, self.weights, 0.0))
            share = np.where(is_open, t * self.weights, share)
            gains = [
                self.most(self.share(p), share) - share[p] if is_open[p] else math.inf
                for p in range(self.parties)
            ]
            is_open &= np.array(gains) > max(1e-8, min(gains))
        return share


def ends(palette, pilot):
    resolved = palette.resolve(pilot)
    return resolved.lower, resolved.upper


def problem(seed):
    """2 to 4 parties with opposing and shared values; guards and whole wishes among them."""
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 5))
    pilot = gaussian_pilot(
        seed, n_prompts=8, n_candidates=N, n_values=m, correlation=rng.uniform(-0.2, 0.5)
    )
    usual = rng.choice([-1, 1], size=m)  # most parties want a value to go the same way
    parties = []
    for p in range(rng.integers(2, 5)):
        targets = {}
        for i in rng.choice(m, size=rng.integers(1, m + 1), replace=False):
            gain = float(rng.choice([-0.4, 0.2, 0.6, 1.0, 1.6]))
            way = usual[i] * rng.choice([-1, 1], p=[0.04, 0.96])
            away = float(pilot.base[i] + way * gain * pilot.scale[i])
            side = "at_least" if way > 0 else "at_most"
            targets[f"v{i}"] = (
                {side: away},
                {side: away},
                {"between": [away, away + 0.3] if way > 0 else [away - 0.3, away]},
                {"gain": gain} if way > 0 else {side: away},
                "keep",
            )[rng.integers(5)]
        parties.append(Party(f"p{p}", Palette(targets), float(rng.choice([0.3, 1, 1, 2.5]))))
    return pilot, parties


def explicit(pilot, parties, candidates=N):
    asked = [ends(party.palette, pilot) for party in parties]
    weights = [party.weight for party in parties]
    return Explicit(pilot.groups(candidates).rewards, asked, weights)


def numbers(by_name):
    return np.array(list(by_name.values()))


@functools.cache
def settled(seed):
    pilot, parties = problem(seed)
    return pilot, parties, negotiate(parties, pilot, N)


def gains(pilot, share, columns=range(3)):
    return Palette({f"v{i}": {"gain": share} for i in columns})
