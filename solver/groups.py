"""Groups of N candidates: the samples over which the served dual takes its expectation."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from solver import ragged
from solver.errors import PilotError

if TYPE_CHECKING:
    from solver.pilot import PilotSet

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

# Numbers in one block of excesses (1 MiB): a block and its temporaries stay in the cache.
BLOCK_NUMBERS = 2**17
# Excesses are kept up to this many numbers (256 MiB) and made anew in each pass beyond, so that a
# million groups need little more memory than the pilot set they are drawn from.
HELD_NUMBERS = 2**25
# A pool is cut into groups as often as needed for this many; the cuts reuse its samples.
LEAST_POOLED_GROUPS = 500
# Variance of a combination of standardised values that is called rounding.
COLLINEAR = 1e-12


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of candidates, standardised and laid out for the solver.

    Attributes
    ----------
    pooled : bool
        Whether groups mix the answers to different prompts.
    flat : ndarray, shape (n_samples, n_values)
        All rewards of the pilot set.
    sample : ndarray, shape (n_groups, n_candidates)
        Row of each candidate in the pilot set's flat rewards.
    prompt : ndarray, shape (n_groups,)
        Cluster for standard errors: the prompt; in a pool, where every sample is its own prompt,
        the group itself.
    n_independent : int
        How many of the groups' clusters are worth an independent draw. Prompts are independent.
        Groups cut from one pool share samples; those of one cut do not, and their number is a safe
        count (the variance of a U-statistic of order N on n samples is at most N/n of its
        kernel's: Hoeffding 1948).
    base, base_rounding : ndarray, shape (n_values,)
        Mean reward of the pilot set, in reward units, and what rounding took from it.
    scale : ndarray, shape (n_values,)
        Reward units per standardised unit.
    is_constant : ndarray of bool, shape (n_values,)
        Values that no choice can change.
    means : ndarray, shape (n_groups, n_values)
        Mean of each group over `base`, in reward units.
    prompt_means : ndarray, shape (n_prompts, n_values), or None
        Mean of all candidates of each prompt, in reward units; None in a pool.
    held : tuple of ndarray, or None
        The blocks, unless they are too many to keep.
    """

    pooled: bool
    flat: FloatArray
    sample: npt.NDArray[np.int32]
    prompt: IntArray
    n_independent: int
    base: FloatArray
    base_rounding: FloatArray
    scale: FloatArray
    is_constant: npt.NDArray[np.bool_]
    means: FloatArray
    prompt_means: FloatArray | None
    held: tuple[FloatArray, ...] | None

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.sample)

    @property
    def n_candidates(self) -> int:
        """Candidates in each group."""
        return int(self.sample.shape[1])

    @property
    def rewards(self) -> FloatArray:
        """Rewards, shape (n_groups, n_candidates, n_values), gathered anew at each call."""
        return self.flat[self.sample]

    @property
    def nbytes(self) -> int:
        """Memory held beyond the pilot set's own rewards."""
        blocks = sum(block.nbytes for block in self.held or ())
        return self.sample.nbytes + self.prompt.nbytes + self.means.nbytes + blocks

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The groups that each block holds."""
        step = max(1, BLOCK_NUMBERS // (self.n_candidates * len(self.scale)))
        ends = range(0, self.n_groups, step)
        return tuple(slice(start, min(start + step, self.n_groups)) for start in ends)

    @property
    def blocks(self) -> Iterable[FloatArray]:
        """Excesses block by block, each of shape (n_values, n_candidates, n_groups of the block).

        Standardised excess of each candidate over the mean of its group. Groups come last, so that
        sums over candidates run along contiguous memory.
        """
        return self._made() if self.held is None else self.held

    def _made(self) -> Iterator[FloatArray]:
        for part in self.slices:
            # The base goes first: means of rewards far from 0 would cost the digits that count.
            excess = self.flat[self.sample[part]] - self.base
            excess -= self.means[part, None]
            excess /= self.scale
            excess[..., self.is_constant] = 0.0  # what is left of a constant is rounding
            yield np.ascontiguousarray(excess.transpose(2, 1, 0))

    def first(self, n_groups: int) -> Groups:
        """Return the first groups, at least `n_groups` of them, as whole blocks, kept."""
        n_blocks = int(np.searchsorted([part.stop for part in self.slices], n_groups)) + 1
        end = self.slices[:n_blocks][-1].stop
        held = None if self.held is None else self.held[:n_blocks]
        part = replace(
            self,
            sample=self.sample[:end],
            prompt=self.prompt[:end],
            means=self.means[:end],
            held=held,
        )
        return part.kept()

    def kept(self) -> Groups:
        """Return the same groups with their blocks kept, unless these are too many."""
        if self.held is not None or self.sample.size * len(self.scale) > HELD_NUMBERS:
            return self
        return replace(self, held=tuple(self._made()))

    @cached_property
    def covariance(self) -> FloatArray:
        """Mean covariance within a group, shape (n_values, n_values), standardised."""
        gram = np.zeros((len(self.scale), len(self.scale)))
        for block in self.blocks:
            flat = block.reshape(len(gram), -1)
            gram += flat @ flat.T
        return gram / self.sample.size

    @cached_property
    def is_collinear(self) -> bool:
        """Whether some combination of values that vary is the same for all candidates."""
        varying = ~self.is_constant
        spread = self.covariance[np.ix_(varying, varying)]
        return bool(varying.any()) and bool(np.linalg.eigvalsh(spread)[0] <= COLLINEAR)


def checked_options(
    pilot: PilotSet, n_candidates: float, groups: int | None, seed: int
) -> tuple[int, int | None, int]:
    """Return the size of a group, how many, and the seed, as Python's own numbers.

    Raises
    ------
    PilotError
        See `PilotSet.groups`.
    """
    size = _group_size(pilot, n_candidates)
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise PilotError(f"seed: {seed!r} is not a whole number from 0 up.")
    if groups is None:
        return size, None, int(seed)
    if isinstance(groups, bool) or not isinstance(groups, numbers.Integral) or groups < 1:
        raise PilotError(
            f"groups: {groups!r} is not a positive whole number; leave it out for all data."
        )
    return size, int(groups), int(seed)


def draw_groups(pilot: PilotSet, n_candidates: float, groups: int | None, seed: int) -> Groups:
    """Return groups of `n_candidates` drawn from `pilot`; see `PilotSet.groups`."""
    size, groups, seed = checked_options(pilot, n_candidates, groups, seed)
    rng = np.random.default_rng([seed, size])
    if pilot.pooled:
        sample, prompt = _cut_pool(pilot.n_prompts, size, n_candidates == math.inf, groups, rng)
        n_independent = max(1, pilot.n_prompts // size)
    elif pilot.counts is not None:
        sample, prompt = ragged.cut_prompts(pilot, size, groups, rng)
        n_independent = len(np.unique(prompt))
    else:
        sample, prompt = _cut_prompts(pilot.n_prompts, pilot.n_candidates, size, groups, rng)
        n_independent = min(pilot.n_prompts, len(prompt))
    flat = pilot.rewards.reshape(-1, len(pilot.values))
    means = np.empty((len(sample), flat.shape[1]))
    drawn = Groups(
        pooled=pilot.pooled,
        flat=flat,
        sample=sample,
        prompt=prompt,
        n_independent=n_independent,
        base=pilot.base,
        base_rounding=pilot.base_rounding,
        scale=pilot.scale,
        is_constant=pilot.is_constant,
        means=means,
        prompt_means=None if pilot.pooled else pilot.prompt_means,
        held=None,
    )
    for part in drawn.slices:
        means[part] = (flat[sample[part]] - pilot.base).mean(axis=1)
    return drawn.kept()


def _group_size(pilot: PilotSet, n_candidates: float) -> int:
    most = pilot.n_prompts if pilot.pooled else pilot.n_candidates
    is_number = isinstance(n_candidates, numbers.Real) and not isinstance(n_candidates, bool)
    if is_number and n_candidates == math.inf:
        if pilot.counts is not None:
            raise PilotError(
                "candidates: all answers are one group only where every prompt has as many; ask "
                f"for at most {most}."
            )
        return most
    if not is_number or not n_candidates >= 1 or n_candidates % 1:
        raise PilotError(f"candidates: {n_candidates!r} is not a whole number from 1 up.")
    if n_candidates > most:
        held = f"{most} samples" if pilot.pooled else f"{most} candidates a prompt"
        raise PilotError(
            f"candidates: {int(n_candidates)} asked, but the pilot set has {held}; calibrate with "
            f"more candidates or ask for at most {most}."
        )
    return int(n_candidates)


def _permuted(n_rows: int, n_columns: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    rows = np.broadcast_to(np.arange(n_columns, dtype=np.int32), (n_rows, n_columns))
    return rng.permuted(rows, axis=1)


def _cut_prompts(
    n_prompts: int, n_samples: int, size: int, groups: int | None, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Shuffle each prompt's candidates and cut them into groups; shuffle again for more."""
    per_cut = n_samples // size
    n_groups = per_cut * n_prompts if groups is None else groups
    n_rounds = -(-n_groups // n_prompts)
    if size == n_samples and n_rounds == 1:
        cut = np.broadcast_to(np.arange(size, dtype=np.int32), (n_prompts, 1, size))
    else:
        n_cuts = -(-n_rounds // per_cut)
        shuffled = [
            _permuted(n_prompts, n_samples, rng)[:, : per_cut * size] for _ in range(n_cuts)
        ]
        cut = np.concatenate(shuffled, axis=1).reshape(n_prompts, -1, size)[:, :n_rounds]
    prompt = np.tile(np.arange(n_prompts), n_rounds)
    flat = cut.transpose(1, 0, 2) + (np.arange(n_prompts, dtype=np.int32) * n_samples)[:, None]
    # Rounds come first: a first part of the groups is spread over all prompts, and the last,
    # incomplete round takes prompts at random.
    keep = np.arange(len(prompt))
    if n_groups < len(prompt):
        last = (n_rounds - 1) * n_prompts
        keep[last:] = last + rng.permutation(n_prompts)
        keep = keep[:n_groups]
    return flat.reshape(-1, size)[keep], prompt[keep]


def _cut_pool(
    n_samples: int, size: int, whole: bool, groups: int | None, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Shuffle the pool and cut it into groups, as often as needed."""
    if whole:
        return np.arange(n_samples, dtype=np.int32)[None], np.zeros(1, dtype=np.intp)
    per_cut = n_samples // size
    n_groups = max(LEAST_POOLED_GROUPS, 4 * per_cut) if groups is None else groups
    n_cuts = -(-n_groups // per_cut)
    cuts = [
        rng.permutation(n_samples).astype(np.int32)[: per_cut * size].reshape(-1, size)
        for _ in range(n_cuts)
    ]
    return np.concatenate(cuts)[:n_groups], np.arange(n_groups)
