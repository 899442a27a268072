"""Is what was promised still what is served? The watch over one calibration and its versions."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from server.calibration import Calibration
from server.promise import Promise
from solver import tilt
from solver.monitoring import DriftTest, allowance

logger = logging.getLogger(__name__)

Kind = Literal["promise", "base"]

# Probability of ever calling a drift that is none, over a calibration's whole life, all values
# together: half of it for calibrations whose error is larger than allowed for, half for requests.
ALPHA = 0.01
# Of a value's scale; a value that never varies has no other error than this.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Watched:
    """One value, watched for one thing.

    Attributes
    ----------
    value : str
    kind : {"promise", "base"}
        What is compared: the level that the choice gives among a request's own candidates with the
        level promised for it, or the mean of these candidates with the calibration's base level.
    direction : int
        1 or -1 where that is found above or below, 0 where no drift is found.
    since : datetime
        When that was found, or the watch began.
    requests : int
        Counted since then.
    mean, low, high : float or None
        Mean of the differences since then, reward units, with its interval; None before there
        are two.
    allowed : float
        How far off the promise's own error may be.
    """

    value: str
    kind: Kind
    direction: int
    since: datetime
    requests: int
    mean: float | None
    low: float | None
    high: float | None
    allowed: float

    @property
    def sentence(self) -> str:
        """What is found, for a warning."""
        side = "above" if self.direction > 0 else "below"
        what = "what is promised" if self.kind == "promise" else "the base level calibrated"
        size = "" if self.mean is None else f" by {abs(self.mean):.3g}"
        if self.low is not None:
            size += f" ({self.low:.3g} to {self.high:.3g})"
        when = self.since.isoformat(timespec="seconds")
        return f"drift: {self.value} is {side} {what}{size}, found {when}"


class Monitor:
    """Watches every value of one calibration, through all its versions.

    Differences are taken from the promise that the request was given, so a new version does not
    interrupt the watch: evidence against an old promise neither counts against the new one nor is
    it forgotten, and a drift that a new version ends is called over when requests show it.

    Parameters
    ----------
    values : tuple of str

    Attributes
    ----------
    watched : tuple of Watched
        The state when it was last published; replaced whole, so any thread may read it.
    warnings : tuple of str
        A sentence for each drift that stands.
    """

    def __init__(self, values: tuple[str, ...]) -> None:
        self.values = values
        n_streams = 2 * len(values)
        self._alpha = 0.5 * ALPHA / n_streams
        self._test = DriftTest(n_streams, self._alpha)
        self._since = [datetime.now(UTC)] * n_streams
        self._directions = np.zeros(n_streams, dtype=np.intp)
        self._bases: dict[str, np.ndarray] = {}
        self.watched: tuple[Watched, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self.publish()

    @property
    def alarmed(self) -> bool:
        """Whether any drift stands now, be it published yet or not."""
        return bool(self._directions.any())

    def take(self, calibration: Calibration, promise: Promise | None, rewards: np.ndarray) -> None:
        """Count one request.

        Parameters
        ----------
        calibration : Calibration
            The version its promise was solved on.
        promise : Promise or None
            None for one that was promised nothing on average.
        rewards : ndarray, shape (n_candidates, n_values)
            Of all its candidates.
        """
        of_promise = self._against_promise(calibration, promise, rewards)
        of_base = self._against_base(calibration, rewards)
        differences, errors, spreads = np.concatenate([of_promise, of_base], axis=1)
        allowed = allowance(errors, self._alpha) + _ROUNDING * np.tile(calibration.pilot.scale, 2)
        self._test.update(differences, allowed, spreads)
        directions = self._test.directions
        for stream in np.flatnonzero(directions != self._directions).tolist():
            self._since[stream] = datetime.now(UTC)
        self._directions = directions

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return all that is known, as arrays of numbers and the names of the values."""
        since = np.array([one.timestamp() for one in self._since])
        return {"values": np.array(self.values), "found": since, **self._test.state()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` returned, and tell of each drift that stands.

        Raises
        ------
        ValueError
            When it is the state of another watch, or none. Nothing is taken over then.
        """
        if not {"values", "found"} <= set(state) or state["values"].tolist() != [*self.values]:
            raise ValueError("it is about other values")
        found = state["found"]
        if found.shape != (len(self._since),) or found.dtype.kind != "f":
            raise ValueError("it does not say since when")
        since = [datetime.fromtimestamp(one, UTC) for one in found.tolist()]
        self._test.restore(state)
        self._since, self._directions = since, self._test.directions
        self.publish()

    def _against_promise(
        self, calibration: Calibration, promise: Promise | None, rewards: np.ndarray
    ) -> np.ndarray:
        """Return differences, standard errors and spreads, shape (3, n_values)."""
        nothing = np.full((3, len(self.values)), np.nan)
        if promise is None or promise.solution is None:
            return nothing
        pilot, solution = calibration.pilot, promise.solution
        floors = [promise.palette.floors.get(name, np.nan) for name in self.values]
        mask = tilt.floor_mask(rewards, floors, promise.palette.on_floor, pilot.scale)
        if not mask.any():  # refused: the promise is about those that are served
            return nothing
        # Less noise than the one answer drawn, and the same mean.
        level = tilt.expected(tilt.log_weights(promise.multipliers, rewards, mask), rewards)
        # Between prompts, and what the weights of one prompt's few candidates leave.
        variance = pilot.n_prompts * solution.stderr**2 + pilot.within_std**2 / max(
            solution.ess, 1.0
        )
        return np.stack([level - solution.expected, solution.stderr, np.sqrt(variance)])

    def _against_base(self, calibration: Calibration, rewards: np.ndarray) -> np.ndarray:
        """Return the same for the mean of the candidates and the base level."""
        pilot = calibration.pilot
        variance = self._bases.get(pilot.fingerprint)
        if variance is None:
            self._bases.clear()  # of an older version
            variance = (
                pilot.prompt_means.var(axis=0, ddof=1)
                if pilot.n_prompts > 1
                else (np.zeros(len(self.values)))
            )
            self._bases[pilot.fingerprint] = variance
        spread = np.sqrt(variance + pilot.within_std**2 / len(rewards))
        errors = np.sqrt(variance / pilot.n_prompts)
        return np.stack([rewards.mean(axis=0) - pilot.base, errors, spread])

    def publish(self) -> None:
        """Make what is known now the state that others read, and log what that changes."""
        before, drift = self.watched, self._test.drift()
        kinds: tuple[Kind, ...] = ("promise", "base")
        streams = [(value, kind) for kind in kinds for value in self.values]
        self.watched = tuple(
            Watched(
                value=value,
                kind=kind,
                direction=int(drift.direction[i]),
                since=self._since[i],
                requests=int(drift.n_since[i]),
                mean=float(drift.mean[i]) if drift.n_since[i] else None,
                low=float(drift.low[i]) if math.isfinite(drift.low[i]) else None,
                high=float(drift.high[i]) if math.isfinite(drift.high[i]) else None,
                allowed=float(drift.allowed[i]),
            )
            for i, (value, kind) in enumerate(streams)
        )
        self.warnings = tuple(one.sentence for one in self.watched if one.direction)
        for old, new in zip(before, self.watched, strict=bool(before)):
            if new.direction not in (0, old.direction):
                logger.warning("%s", new.sentence.split(",")[0])
            elif new.direction != old.direction:
                when = old.since.isoformat(timespec="seconds")
                logger.info("drift of %s (%s), found %s, is over", old.value, old.kind, when)
