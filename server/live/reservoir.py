"""The prompts a calibration stands on, renewed by live traffic: rewards only, no text."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from server.calibration import Calibration
from solver import PilotError, PilotSet

# A quantile within a prompt needs some answers: fewer are not taken in.
LEAST_CANDIDATES = 8


class ReservoirError(Exception):
    """A kept reservoir that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """One prompt's candidates, shape (n_candidates, n_values); live, or of the root."""

    rewards: np.ndarray
    is_live: bool


class Reservoir:
    """An unweighted sample of prompts that forgets exponentially.

    Parameters
    ----------
    root : Calibration
        What it begins with.
    half_life : float
        Live prompts after which half of what was there is gone.
    rng : numpy.random.Generator

    Attributes
    ----------
    version : int
        How many calibrations were made of it; 0 is the root itself.
    updated : datetime
        When the last of them was made.
    n_new : int
        Live prompts taken in since.

    Notes
    -----
    Biased reservoir sampling (Aggarwal 2006, VLDB, 607-618): for each prompt that comes in, each
    one that is there leaves with probability 1 − 2^(−1/half_life), independently. So the ages are
    geometric, the content is an unweighted sample of a past that fades, and its solutions,
    certificates and standard errors are those of any pilot set. It levels off at
    half_life / ln 2 prompts, whatever the root has.
    """

    def __init__(self, root: Calibration, half_life: float, rng: np.random.Generator) -> None:
        self.root = root
        self.version = 0
        self.updated: datetime = root.info.created
        self.n_new = 0
        self._leaving = -math.expm1(-math.log(2) / half_life)
        self._rng = rng
        self._slots = [_Slot(rewards, is_live=False) for rewards in root.pilot.rewards]

    @property
    def n_prompts(self) -> int:
        """Prompts in it."""
        return len(self._slots)

    @property
    def n_live(self) -> int:
        """Prompts in it that live traffic brought."""
        return sum(slot.is_live for slot in self._slots)

    @property
    def most_candidates(self) -> int:
        """Candidates of a prompt that can be held: as many as the root has."""
        return int(self.root.pilot.rewards.shape[1])

    def add(self, rewards: np.ndarray, haste: float = 1.0) -> None:
        """Take in one live prompt's candidates, shape (n_candidates, n_values), all of them.

        With `haste` above 1 those that are there leave as many times as fast.

        Candidates of one prompt are alike before any is chosen, so of more than the root has the
        first are as good as any.
        """
        n_leaving = int(self._rng.binomial(len(self._slots), min(1.0, haste * self._leaving)))
        for at in sorted(self._rng.choice(len(self._slots), n_leaving, replace=False))[::-1]:
            self._slots[at] = self._slots[-1]
            self._slots.pop()
        width = self.most_candidates
        self._slots.append(_Slot(np.array(rewards[:width], dtype=np.float64), is_live=True))
        self.n_new += 1

    def calibration(self) -> Calibration:
        """Return what is there as the next version of the calibration."""
        self.version += 1
        self.updated = datetime.now(UTC)
        self.n_new = 0
        return self.current()

    def current(self) -> Calibration:
        """Return what is there as the version it is; the root itself as long as nothing came."""
        if self.version == 0:
            return self.root
        return replace(
            self.root,
            pilot=self._pilot({}),
            version=self.version,
            updated=self.updated,
            live_prompts=self.n_live,
            root=self.root,
        )

    def _pilot(self, metadata: dict[str, Any]) -> PilotSet:
        root = self.root.pilot
        width = root.rewards.shape[1]
        rewards = np.zeros((len(self._slots), width, root.n_values))
        counts = np.empty(len(self._slots), dtype=np.intp)
        for i, slot in enumerate(self._slots):
            counts[i] = len(slot.rewards)
            rewards[i, : counts[i]] = slot.rewards
        return PilotSet(rewards, root.values, counts=counts, metadata=metadata)

    def save(self, path: Path) -> None:
        """Write it in one piece: a reader sees the old file or the new one.

        What came since the last version comes back as the next one.

        Raises
        ------
        PilotError
            When the folder cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        updated = datetime.now(UTC) if self.n_new else self.updated
        kept = {
            "root": self.root.pilot.fingerprint,
            "version": self.version + (self.n_new > 0),
            "updated": updated.isoformat(),
            "live": [i for i, slot in enumerate(self._slots) if slot.is_live],
        }
        info = self.root.info.model_dump(mode="json")
        self._pilot({"calibration": info, "live": kept}).save(path)

    def restore(self, path: Path) -> None:
        """Take over what `save` wrote.

        Raises
        ------
        ReservoirError
            When the file is damaged or grew from another calibration.
        """
        try:
            pilot = PilotSet.load(path)
            kept = pilot.metadata["live"]
            root, version = kept["root"], int(kept["version"])
            updated = datetime.fromisoformat(kept["updated"])
            live = {int(i) for i in kept["live"]}
        except (PilotError, KeyError, TypeError, ValueError) as error:
            msg = f"{path} is no reservoir of live prompts: {error}"
            raise ReservoirError(msg) from error
        width = self.most_candidates
        if root != self.root.pilot.fingerprint or pilot.rewards.shape[1] != width:
            msg = f"{path} grew from another calibration than {self.root.id}"
            raise ReservoirError(msg)
        counts = [width] * pilot.n_prompts if pilot.counts is None else pilot.counts.tolist()
        self._slots = [
            _Slot(np.array(rewards[:n]), i in live)
            for i, (rewards, n) in enumerate(zip(pilot.rewards, counts, strict=True))
        ]
        self.version, self.updated = version, updated
