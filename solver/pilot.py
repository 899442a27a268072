"""The pilot set: what the base model says to typical prompts, as rewards."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from solver import pilot_files, ragged
from solver.errors import PilotError
from solver.groups import Groups, checked_options, draw_groups
from solver.pilot_checks import checked_names, checked_rewards

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

# Groups kept for the next solve with the same N: this many sets, and together this many bytes.
KEPT_GROUPS = 8
KEPT_GROUPS_BYTES = 256 * 2**20


class PilotSet:
    """Rewards of base-model answers, on which palettes are solved.

    Parameters
    ----------
    rewards : array_like, shape (n_prompts, n_candidates, n_values)
        Rewards of several answers to each prompt. With ``pooled=True``, shape
        (n_samples, n_values): one answer a prompt, and groups are then drawn from the pool (the
        paper's format; it lets a palette be met by preferring prompts).
    values : sequence of str
        Name of each value, in the order of the last axis.
    pooled : bool
        Whether there is one answer a prompt.
    metadata : mapping, optional
        JSON-able notes kept with the file: model, sampling settings, date.
    counts : array_like of int, shape (n_prompts,), optional
        Answers to each prompt, where prompts have fewer than the array is wide; the rewards beyond
        are not read. `solver.ragged` says what levels and groups mean then.

    Raises
    ------
    PilotError
        The rewards are empty, not finite, beyond ±1e100, or do not match the names.

    Notes
    -----
    The samples are the population everywhere in this package: standard deviations divide by the
    number of samples, quantiles interpolate between them, so that stacking a pilot set on itself
    changes nothing. Arrays are read-only; an instance is safe to share between threads.
    """

    def __init__(
        self,
        rewards: npt.ArrayLike,
        values: Sequence[str],
        *,
        pooled: bool = False,
        metadata: Mapping[str, Any] | None = None,
        counts: npt.ArrayLike | None = None,
    ) -> None:
        self.values = checked_names(values)
        array = checked_rewards(rewards, self.values, pooled)
        self.counts: IntArray | None = ragged.checked_counts(counts, array, pooled)
        array.setflags(write=False)
        self.rewards: FloatArray = array
        self.pooled = bool(pooled)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._groups: OrderedDict[tuple[float, int | None, int], Groups] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.rewards.shape))
        return f"PilotSet({shape}, values={self.values}, pooled={self.pooled})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the rewards alone; everything else is recomputed where it lands."""
        content = np.array(self.rewards), self.values, self.pooled, self.metadata, self.counts
        return _rebuild, content

    @property
    def n_prompts(self) -> int:
        """Number of prompts; of samples in a pool."""
        return len(self.rewards)

    @property
    def n_candidates(self) -> int:
        """Answers to each prompt, or to at least half of the prompts; 1 in a pool."""
        if self.counts is not None:
            return ragged.promised(self.counts)
        return 1 if self.pooled else int(self.rewards.shape[1])

    @property
    def n_values(self) -> int:
        """Number of values."""
        return len(self.values)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the rewards, the names and their arrangement."""
        head = json.dumps([list(self.rewards.shape), list(self.values), self.pooled])
        digest = hashlib.sha256(head.encode())
        digest.update(self.rewards.astype("<f8", copy=False).tobytes())
        if self.counts is not None:
            digest.update(self.counts.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def base(self) -> FloatArray:
        """Mean reward of the base model, shape (n_values,), reward units."""
        flat = self.rewards.reshape(-1, self.n_values)
        if self.counts is not None:
            return np.asarray(flat[0] + (self.prompt_means - flat[0]).mean(axis=0))
        return np.asarray(flat[0] + (flat - flat[0]).mean(axis=0))

    @cached_property
    def base_rounding(self) -> FloatArray:
        """What rounding took from `base`, shape (n_values,): a level far from 0 has few digits."""
        if self.counts is not None:
            return np.asarray((self.prompt_means - self.base).mean(axis=0))
        flat = self.rewards.reshape(-1, self.n_values)
        return np.asarray((flat - self.base).mean(axis=0))

    @cached_property
    def prompt_means(self) -> FloatArray:
        """Mean reward of each prompt's answers, shape (n_prompts, n_values), reward units."""
        if self.counts is not None:
            return ragged.prompt_means(self.rewards, self.counts)
        return self.rewards if self.pooled else np.asarray(self.rewards.mean(axis=1))

    @cached_property
    def _covariance(self) -> FloatArray:
        """Mean covariance within a prompt (of the pool, when pooled), shape (m, m)."""
        if self.counts is not None:
            return ragged.covariance(self.rewards, self.counts, self.prompt_means)
        spread = self.rewards[None] if self.pooled else self.rewards
        spread = spread - spread[:, :1]
        spread -= spread.mean(axis=1, keepdims=True)
        flat = spread.reshape(-1, self.n_values)
        return np.asarray(flat.T @ flat / len(flat))

    @cached_property
    def within_std(self) -> FloatArray:
        """Root of the mean variance within a prompt, shape (n_values,), reward units."""
        return np.sqrt(np.diag(self._covariance))

    @cached_property
    def _largest(self) -> FloatArray:
        return np.asarray(np.abs(self.rewards).max(axis=tuple(range(self.rewards.ndim - 1))))

    @cached_property
    def is_constant(self) -> npt.NDArray[np.bool_]:
        """Values that no choice among answers to one prompt can change, shape (n_values,)."""
        return np.asarray(self.within_std <= 1e-14 * self._largest)

    @cached_property
    def scale(self) -> FloatArray:
        """Reward units per standardised unit, shape (n_values,)."""
        own = np.where(self._largest > 0.0, self._largest, 1.0)
        return np.where(self.is_constant, own, self.within_std)

    @cached_property
    def correlation(self) -> FloatArray:
        """Correlation within a prompt, shape (n_values, n_values); 0 with a constant value."""
        scale = np.where(self.is_constant, np.inf, self.within_std)
        correlation: FloatArray = self._covariance / scale / scale[:, None]
        np.fill_diagonal(correlation, 1.0)
        return correlation

    @cached_property
    def _mean_order_statistics(self) -> FloatArray:
        """Mean over prompts of the k-th smallest reward, shape (n_candidates, n_values)."""
        if self.pooled:
            return np.sort(self.rewards, axis=0)
        return np.asarray(np.sort(self.rewards, axis=1).mean(axis=0))

    @cached_property
    def _order_statistics_by_count(self) -> dict[int, tuple[float, FloatArray]]:
        """Share of the prompts with n answers, and their mean order statistics, by n."""
        counts = self.counts
        assert counts is not None
        return {
            int(n): (
                float(np.mean(counts == n)),
                np.sort(self.rewards[counts == n, :n], axis=1).mean(axis=0),
            )
            for n in np.unique(counts)
        }

    @cached_property
    def _sorted_pool(self) -> FloatArray:
        return np.sort(self.rewards.reshape(-1, self.n_values), axis=0)

    def quantile(self, q: float, column: int | slice = slice(None)) -> FloatArray:
        """Return the mean over prompts of the q-quantile within a prompt, shape (n_values,).

        Of a single value, shape (), where `column` says which.

        A quantile interpolates linearly between order statistics, so the mean over prompts is
        that interpolation between their means. In a pool it is the quantile of the pool.
        """
        if self.counts is None:
            return _interpolate(self._mean_order_statistics[:, column], q)
        _check_share(q)
        total = np.zeros(self.n_values)[column]
        for n, (share, ordered) in self._order_statistics_by_count.items():
            weights = ragged.quantile_weights(q, n, self.rewards.shape[1])
            total = total + share * (weights @ ordered[:, column])
        return np.asarray(total)

    def traffic_quantile(self, q: float, column: int | slice = slice(None)) -> FloatArray:
        """Return the q-quantile over all prompts and answers together, as `quantile` does."""
        if self.counts is not None:
            _check_share(q)
            return ragged.pooled_quantile(self.rewards, self.counts, q)[column]
        return _interpolate(self._sorted_pool[:, column], q)

    def groups(self, n_candidates: float, *, groups: int | None = None, seed: int = 0) -> Groups:
        """Return groups of `n_candidates` answers to the same prompt.

        Parameters
        ----------
        n_candidates : int or math.inf
            Candidates in a group, N; prompts with fewer have none. Infinity takes all of a
            prompt's answers as one group, the plug-in for N → ∞; in a pool the whole pool is the
            single group, which is the paper's pooled dual.
        groups : int, optional
            How many. By default each prompt's answers are shuffled and cut into disjoint groups,
            so that all data count once; a larger number shuffles and cuts again (an incomplete
            U-statistic), a smaller one is spread evenly over the prompts. A pool is shuffled and
            cut four times, and oftener when that makes fewer than 500 groups.
        seed : int
            Of the shuffles; the same groups come back for the same seed.

        Raises
        ------
        PilotError
            There are fewer than N answers (to at least half of the prompts), or N is not a whole
            number from 1 up.
        """
        size, groups, seed = checked_options(self, n_candidates, groups, seed)
        # All candidates of a prompt are another draw when that is said with infinity.
        key = (n_candidates if n_candidates == math.inf else size, groups, seed)
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
        drawn = draw_groups(self, n_candidates, groups, seed)
        with self._lock:
            self._groups[key] = drawn
            held = sum(kept.nbytes for kept in self._groups.values())
            # The newest stays whatever its size: the next solve is likely to want it.
            while len(self._groups) > 1 and (
                len(self._groups) > KEPT_GROUPS or held > KEPT_GROUPS_BYTES
            ):
                _, dropped = self._groups.popitem(last=False)
                held -= dropped.nbytes
        return drawn

    def save(self, path: str | Path) -> None:
        """Write a calibration file, whole or not at all; see `pilot_files.save`."""
        pilot_files.save(
            Path(path),
            self.rewards,
            self.values,
            self.pooled,
            self.metadata,
            self.fingerprint,
            self.counts,
        )

    @classmethod
    def load(cls, path: str | Path) -> PilotSet:
        """Return the pilot set in a file of any of the three formats; see `pilot_files.load`.

        Raises
        ------
        PilotError
            The file is missing, damaged, or holds something else; the message names the line.
        """
        content = pilot_files.load(Path(path))
        try:
            pilot = cls(
                content.rewards,
                content.values,
                pooled=content.pooled,
                metadata=content.metadata,
                counts=content.counts,
            )
        except PilotError as error:
            raise PilotError(f"{path}: {error}") from error
        if content.fingerprint is not None and content.fingerprint != pilot.fingerprint:
            raise PilotError(
                f"{path}: the rewards do not match the fingerprint written with them; the file was "
                "changed or damaged. Calibrate again or restore it."
            )
        return pilot


def _rebuild(
    rewards: FloatArray,
    values: tuple[str, ...],
    pooled: bool,
    metadata: dict[str, Any],
    counts: IntArray | None,
) -> PilotSet:
    return PilotSet(rewards, values, pooled=pooled, metadata=metadata, counts=counts)


def _check_share(q: float) -> None:
    if not 0.0 <= q <= 1.0:
        raise PilotError(f"quantile: {q} is outside [0, 1].")


def _interpolate(ordered: FloatArray, q: float) -> FloatArray:
    _check_share(q)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return np.asarray(ordered[below] + (position - below) * (ordered[above] - ordered[below]))
