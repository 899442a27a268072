"""What a choice can do, worked out the plain way; whether verdicts near its limits are right."""

import math
import re
from dataclasses import dataclass

import numpy as np

from solver import Palette, PilotSet, Status, solve
from tests.solver.problems import explicit_fraction

# HiGHS works to about 1e-9 and the levels asked are rounded; closer than this nothing is claimed.
TOLERANCE = 1e-7
FARTHEST = 20.0
NEAR = [share * side for share in (1e-3, 1e-5, 1e-6) for side in (-1.0, 1.0)]
KINDS = ["quantile", "traffic", "gain", "at_least", "at_most", "between", "pinned", "keep", "free"]
NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?)"


@dataclass
class Arena:
    """What a choice among n candidates has to choose from, worked out the plain way."""

    rewards: np.ndarray
    allowed: np.ndarray

    @classmethod
    def of(cls, pilot, n, floors=None, on_floor="refuse"):
        raw = pilot.groups(n).rewards
        # Candidates left over by the cut are made up for: levels count from the pilot's own mean.
        rewards = raw + (pilot.rewards.reshape(-1, pilot.n_values) - raw.mean(axis=(0, 1))).mean(0)
        allowed = np.ones(raw.shape[:2], dtype=bool)
        for name, floor in (floors or {}).items():
            allowed &= raw[..., pilot.values.index(name)] >= floor
        if on_floor == "best":
            for group in np.flatnonzero(~allowed.any(axis=1)):
                ((name, floor),) = floors.items()
                missed = floor - raw[group, :, pilot.values.index(name)]
                allowed[group, missed.argmin()] = True
        kept = allowed.any(axis=1)
        return cls(rewards[kept], allowed[kept])

    def served(self, multipliers):
        """Levels of the softmax choice."""
        excess = self.rewards - self.rewards.mean(axis=1, keepdims=True)
        score = np.where(self.allowed, excess @ multipliers, -np.inf)
        weights = np.exp(score - score.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.einsum("gn,gnm->m", weights, self.rewards) / len(self.rewards)

    def support(self, direction):
        best = np.where(self.allowed, self.rewards @ direction, -np.inf).max(axis=1)
        return math.fsum(best) / len(best)


@dataclass
class Ray:
    """Palettes from the uniform choice (0) through one in a random direction (1) and beyond."""

    pilot: PilotSet
    kinds: list
    start: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    extra: dict
    floors: dict
    on_floor: str

    @classmethod
    def draw(cls, pilot, n, rng):
        m = pilot.n_values
        floors, on_floor, extra = {}, "refuse", {}
        kinds = list(rng.choice(KINDS, size=m))
        if rng.random() < 0.2:
            i = int(rng.integers(m))
            rewards = pilot.rewards[..., i]
            floors = {pilot.values[i]: float(np.quantile(rewards, rng.choice([0.05, 0.3])))}
            on_floor = str(rng.choice(["refuse", "best"]))
            # Floors move the uniform choice off the base, to which `keep` is tied.
            kinds = ["at_least" if kind == "keep" else kind for kind in kinds]
        if rng.random() < 0.2:
            i = int(rng.integers(m))
            kinds[i] = "free"
            extra[pilot.values[i]] = {"multiplier": float(rng.normal() / pilot.scale[i])}
        if all(kind in ("free", "keep") for kind in kinds):
            kinds[int(rng.integers(m))] = "at_least"
        arena = Arena.of(pilot, n, floors, on_floor)
        start = arena.served(np.zeros(m)) if len(arena.rewards) else pilot.base
        step = rng.normal(size=m) * pilot.scale
        width = rng.choice([0.05, 0.5], size=m) * pilot.scale
        level = np.where([kind == "keep" for kind in kinds], pilot.base, start + step)
        lower = np.where([kind in ("free", "at_most") for kind in kinds], -np.inf, level)
        upper = np.full(m, np.inf)
        for i, kind in enumerate(kinds):
            if kind in ("at_most", "pinned"):
                upper[i] = level[i]
            elif kind == "between":
                upper[i] = level[i] + width[i]
                if step[i] < 0:
                    lower[i], upper[i] = level[i] - width[i], level[i]
        return cls(pilot, kinds, start, lower, upper, extra, floors, on_floor), arena

    def limit(self, arena):
        return explicit_fraction(
            arena.rewards, self.start, self.lower, self.upper, self.pilot.scale, FARTHEST,
            arena.allowed,
        )  # fmt: skip

    @property
    def unit(self):
        """Largest change of a bound, standardised, per unit of the way."""
        change = np.stack([self.lower, -self.upper]) - np.stack([self.start, -self.start])
        return float((change / self.pilot.scale)[np.isfinite(change)].max(initial=0.0))

    def at(self, share):
        """The palette there, and the bounds it means."""
        pilot, targets = self.pilot, dict(self.extra)
        lower, upper = self.lower.copy(), self.upper.copy()
        for ends in (lower, upper):
            some = np.isfinite(ends)
            ends[some] = self.start[some] + share * (ends[some] - self.start[some])
        for i, (name, kind) in enumerate(zip(pilot.values, self.kinds, strict=True)):
            low, high = float(lower[i]), float(upper[i])
            if kind in ("quantile", "traffic"):
                ordered = np.sort(pilot.rewards.reshape(-1, pilot.n_values)[:, i])
                if kind == "quantile" and not pilot.pooled:
                    ordered = np.sort(pilot.rewards[..., i], axis=1).mean(axis=0)
                steps = np.linspace(0, 1, len(ordered))
                q = float(np.interp(low, ordered, steps)) if len(ordered) > 1 else 0.0
                if 0.0 < q < 1.0:
                    lower[i] = np.interp(q, steps, ordered)
                    targets[name] = {
                        "quantile": q,
                        "of": "prompt" if kind == "quantile" else "traffic",
                    }
                    continue
                kind = "at_least"
            if kind == "gain" and not pilot.is_constant[i]:
                gain = (low - float(pilot.base[i])) / float(pilot.within_std[i])
                targets[name] = {"gain": gain}
            elif kind in ("gain", "at_least"):
                targets[name] = {"at_least": low}
            elif kind == "at_most":
                targets[name] = {"at_most": high}
            elif kind in ("between", "pinned"):
                targets[name] = {"between": [low, max(low, high)]}  # rounding may cross them
            elif kind == "keep":
                targets[name] = "keep"
        return Palette(targets, self.floors, self.on_floor), lower, upper


def printed(proof):
    """The two numbers of the sentence, the larger first as it claims."""
    way, limit, asked = re.fullmatch(
        rf"no choice among .* gives (more|less) than {NUMBER} of .*; the palette asks for {NUMBER}",
        proof.sentence,
    ).groups()
    ends = float(asked), float(limit)
    return ends if way == "more" else ends[::-1]


def check_proof(solution, arena, lower, upper, pilot):
    """u·c > h_N(u), summed anew without the solver, and said so by the sentence."""
    proof = solution.certificate
    u = np.array([proof.direction.get(name, 0.0) for name in pilot.values])
    ends = np.where(u > 0, lower, upper)[u != 0]
    asks, gives = math.fsum(u[u != 0] * ends), arena.support(u)
    rounding = 1e-14 * float(np.abs(u) @ np.abs(arena.rewards).max(axis=(0, 1)))
    assert asks - gives > -rounding
    assert proof.asked > proof.limit
    np.testing.assert_allclose([proof.asked, proof.limit], [asks, gives], rtol=1e-9, atol=rounding)
    high, low = printed(proof)
    assert high > low


def check_solution(solution, arena, lower, upper, pilot, extra=()):
    """The optimality conditions, from the multipliers alone."""
    assert solution.kkt_residual <= 1e-8
    levels = arena.served(solution.multipliers)
    np.testing.assert_allclose((levels - solution.expected) / pilot.scale, 0.0, atol=1e-8)
    short, over = (lower - levels) / pilot.scale, (levels - upper) / pilot.scale
    solved = np.array([name not in extra for name in pilot.values])
    multipliers = np.where(solved, solution.multipliers * pilot.scale, 0.0)
    assert np.maximum(short, over).max() <= TOLERANCE
    assert np.minimum(-short, multipliers).max() <= TOLERANCE
    assert np.minimum(-over, -multipliers).max() <= TOLERANCE


def check_verdict(solution, margin, arena, lower, upper, pilot, extra=()):
    """Right where the exact margin (standardised, of its sign) says so, and proven anyway."""
    if margin > TOLERANCE:
        assert solution.status in (Status.OPTIMAL, Status.STEP_LIMIT)
    elif margin < -TOLERANCE:
        assert solution.status is Status.INFEASIBLE
    if solution.status is Status.INFEASIBLE:
        check_proof(solution, arena, lower, upper, pilot)
    elif solution.status is Status.OPTIMAL:
        check_solution(solution, arena, lower, upper, pilot, extra)
    else:
        assert solution.is_achievable


def check_near_the_limit(pilot, n, seed, near=NEAR):
    """The palettes of one ray around its limit; returns how many verdicts of each kind."""
    ray, arena = Ray.draw(pilot, n, np.random.default_rng(seed))
    limit = ray.limit(arena)
    found = []
    for share in near if limit < FARTHEST else near[::2]:
        palette, lower, upper = ray.at(limit * (1 + share))
        margin = -share * limit * ray.unit
        solution = solve(palette, pilot, n)
        check_verdict(solution, margin, arena, lower, upper, pilot, ray.extra)
        found.append(solution.status)
    return found
