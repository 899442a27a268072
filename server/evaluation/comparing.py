"""One palette, every method, the same candidates: the figures of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from server.evaluation.collecting import Collected
from server.evaluation.measures import (
    Mean,
    cut,
    delivery,
    improves,
    kl_and_ess,
    mean_over_prompts,
    quantile_of,
    served_levels,
    share,
    win_rates,
)
from server.evaluation.methods import Method, bounds_of, methods_of, senses_of
from server.evaluation.texts import diversity
from server.promise import Promise
from solver import PilotSet, Solution, tilt

FloatArray = npt.NDArray[np.float64]
Json = dict[str, Any]


class Comparison:
    """The methods of one palette on the collected candidates.

    Parameters
    ----------
    promise : Promise
        With a solution.
    pilot : PilotSet
        It was solved on.
    collected : Collected
        With at least two prompts.
    watches : sequence of (str, str)
        Value and the column that watches it, one pair for each column of `Collected.watched`.
    """

    def __init__(
        self,
        promise: Promise,
        pilot: PilotSet,
        collected: Collected,
        watches: Sequence[tuple[str, str]] = (),
    ) -> None:
        if promise.solution is None:
            raise ValueError("a promise that nothing was solved for cannot be evaluated")
        n = promise.n_candidates
        self.promise = promise
        self.solution: Solution = promise.solution
        self.pilot = pilot
        self.collected = collected
        self.watches = list(watches)
        self.senses = senses_of(promise.palette, pilot.values)
        self.groups = cut(collected.rewards, n)
        self.watched = cut(collected.watched, n)
        self.lengths = np.stack([cut(collected.tokens, n), cut(collected.words, n)], axis=-1)
        self.base = collected.rewards.mean(axis=1)[:, None]
        self.watched_base = collected.watched.mean(axis=1)[:, None]

    def to_dict(self) -> Json:
        """Return the palette's part of the report: what was promised, and each method's figures."""
        solution, values = self.solution, self.pilot.values
        asked = {
            value: bounds_of(self.promise.palette, solution, value) for value in solution.targets
        }
        return {
            "status": self.promise.status,
            "served_palette": self.promise.palette.to_dict(),
            "candidates": self.promise.n_candidates,
            "asked": {value: _ends(ends) for value, ends in asked.items()},
            "senses": {
                value: int(self.senses[i]) for i, value in enumerate(values) if self.senses[i]
            },
            "promised": {
                value: {"level": float(solution.expected[i]), "stderr": float(solution.stderr[i])}
                for i, value in enumerate(values)
            },
            "repair": self.promise.repair,
            "limited_by": solution.limited_by,
            "fraction": solution.fraction,
            "methods": {
                method.name: self._figures(method)
                for method in methods_of(self.promise, self.pilot)
            },
        }

    def _figures(self, method: Method) -> Json:
        """Return what one method delivers, or why it cannot be used."""
        if method.multipliers is None:
            return {"reason": method.reason}
        collected, values = self.collected, self.pilot.values
        weights = method.weights(self.groups)
        is_served: npt.NDArray[np.bool_] = np.asarray(weights.any(axis=-1))
        if not is_served.any():
            return {"reason": "the floors refuse every answer"}

        def mean(rows: FloatArray) -> Mean:
            return mean_over_prompts(rows, is_served, collected.cluster)

        served = served_levels(weights, self.groups)
        levels, gains = mean(served), mean(served - self.base)
        wins = mean(win_rates(method.weights, self.groups))
        divergence, size = mean(kl_and_ess(weights)).mean.tolist()
        tokens, n_words = mean(served_levels(weights, self.lengths)).mean.tolist()
        n = self.promise.n_candidates
        spent = float(collected.tokens.mean()) * (1 if method.name == "base" else n)
        prompts = is_served.any(axis=1)
        counts = is_served.sum(axis=1)[prompts, None]
        own = np.where(is_served[..., None], served - self.base, 0.0)[prompts].sum(axis=1) / counts
        better = share(improves(own, self.senses, self.pilot.scale))
        found: Json = {
            "reason": None,
            "multipliers": _by_name(values, method.multipliers) if not method.is_greedy else None,
            "levels": _intervals(values, levels),
            "gains": _intervals(values, gains),
            "gains_sigma": _intervals(values, gains, self.pilot.scale),
            "win_rate": _intervals(values, wins),
            "delivered": self._delivered(levels, is_promise=method.name == "palette"),
            "prompts_better_on_all": dict(zip(("share", "low", "high"), better, strict=True)),
            "better_on_all_by_reward": bool(
                improves(gains.mean[None], self.senses, self.pilot.scale)[0]
            ),
            "better_on_all_by_wins": bool(
                improves(wins.mean[None] - 0.5, self.senses, np.ones(len(values)))[0]
            ),
            "kl": divergence,
            "kl_bound": math.log(n),
            "ess": size,
            "refused": float(1.0 - is_served.mean()),
            "tokens_spent": spent,
            "tokens_served": tokens,
            "words_served": n_words,
            "diversity": self._diversity(weights),
        }
        if self.watches:
            found["watched"] = self._watched(weights, gains, mean)
        return found

    def _delivered(self, levels: Mean, *, is_promise: bool) -> Json:
        """Return, by value asked for, how far the level is from what was asked.

        In within-prompt standard deviations; negative is a shortfall. The interval of the palette
        itself has two variances, that of these prompts and that of the calibration, which promised
        the level; other methods promised nothing, so theirs has that of these prompts alone.
        """
        solution, scale = self.solution, self.pilot.scale
        half = levels.half_width(solution.stderr if is_promise else 0.0)
        found = {}
        for value in solution.targets:
            i = solution.values.index(value)
            ends = bounds_of(self.promise.palette, solution, value)
            multiplier = float(solution.multipliers[i])
            error = delivery(float(levels.mean[i]), ends, multiplier) / scale[i]
            width = float(half[i] / scale[i])
            # Where nothing binds, more than was asked for is no miss.
            is_missed = error + width < 0 or (multiplier != 0 and error - width > 0)
            found[value] = {
                "error_sigma": float(error),
                "half_width_sigma": width,
                "binds": multiplier != 0,
                "as_asked": not is_missed,
            }
        return found

    def _diversity(self, weights: FloatArray) -> Json | None:
        """Return the diversity of one answer a prompt, drawn as the server draws."""
        if self.collected.texts is None:
            return None
        served = []
        for own, texts, seed in zip(
            weights[:, 0], self.collected.texts, self.collected.seeds, strict=True
        ):
            if own.any():
                with np.errstate(divide="ignore"):
                    logs = np.log(own)
                # The stream of the server's own draw: `Aligner`.
                stream = int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0])
                served.append(texts[int(tilt.draw(logs, stream)[0])])
        return diversity(served)

    def _watched(self, weights: FloatArray, gains: Mean, mean: Any) -> Json:
        """Return, by watched value, what its watch says, and whether the two part ways.

        They do where the whole interval of the value's gain is above 0 and the whole interval of
        its watch's is below, in the direction in which the palette wants the value.
        """
        found = mean(served_levels(weights, self.watched) - self.watched_base)
        spread = self.collected.watched.std(axis=1)
        sigma = np.sqrt((spread * spread).mean(axis=0))
        sigma = np.where(sigma > 0.0, sigma, 1.0)
        own, other = gains.half_width(), found.half_width()
        told = {}
        for k, (value, column) in enumerate(self.watches):
            i = self.pilot.values.index(value)
            sense = self.senses[i]
            told[value] = {
                "column": column,
                "gain_sigma": float(found.mean[k] / sigma[k]),
                "half_width_sigma": float(other[k] / sigma[k]),
                "parts_ways": bool(
                    sense != 0
                    and sense * gains.mean[i] - own[i] > 0
                    and sense * found.mean[k] + other[k] < 0
                ),
            }
        return told


def base_levels(pilot: PilotSet, rewards: FloatArray, cluster: npt.NDArray[np.intp]) -> Json:
    """Return, by value, the base model's level on these prompts and on the calibration's.

    ``shift_sigma`` is their difference in within-prompt standard deviations, with the 95 % interval
    of both samples' errors: outside of it, these prompts are of another kind than those that the
    calibration was made with, and what it promises is not for them. ``is_shifted`` says so only
    where it would be rare to say it of any value by chance (Bonferroni, 5 % for all together).
    """
    everywhere = np.ones((len(rewards), 1), dtype=bool)
    here = mean_over_prompts(rewards.mean(axis=1)[:, None], everywhere, cluster)
    there = mean_over_prompts(
        pilot.prompt_means[:, None],
        np.ones((pilot.n_prompts, 1), dtype=bool),
        np.arange(pilot.n_prompts),
    )
    half = here.half_width(there.stderr)
    rare = half * quantile_of(here.n_clusters, 0.05 / pilot.n_values)
    rare /= quantile_of(here.n_clusters)
    difference = here.mean - there.mean
    return {
        value: {
            "level": float(here.mean[i]),
            "stderr": float(here.stderr[i]),
            "calibration": float(there.mean[i]),
            "shift_sigma": float(difference[i] / pilot.scale[i]),
            "half_width_sigma": float(half[i] / pilot.scale[i]),
            "is_shifted": bool(abs(difference[i]) > rare[i]),
        }
        for i, value in enumerate(pilot.values)
    }


def _intervals(values: Sequence[str], found: Mean, unit: FloatArray | float = 1.0) -> Json:
    mean, half = found.mean / unit, found.half_width() / unit
    return {
        value: {
            "mean": float(mean[i]),
            "low": float(mean[i] - half[i]),
            "high": float(mean[i] + half[i]),
        }
        for i, value in enumerate(values)
    }


def _by_name(values: Sequence[str], array: FloatArray) -> dict[str, float]:
    return dict(zip(values, array.tolist(), strict=True))


def _ends(ends: tuple[float, float]) -> list[float | None]:
    return [end if math.isfinite(end) else None for end in ends]
