"""One calibration's live state: its prompts, its watch, and the palettes that are asked of it."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from server.calibration import Calibration
from server.live.intake import Arrival, Reason, Repeats
from server.live.monitor import Monitor
from server.live.reservoir import LEAST_CANDIDATES, Reservoir, ReservoirError
from server.live.watch_file import WatchError, load_watch, save_watch
from server.promise import palette_of
from server.schemas import PaletteOptions
from solver import PilotError, PilotSet, SolutionCache
from solver.pilot_files import sweep

logger = logging.getLogger(__name__)

Mode = Literal["on", "frozen"]

# A new version is made when a share of its prompts, and some number, is new, or after a while if
# any is.
NEW_SHARE = 0.05
LEAST_NEW = 16
LONGEST_WAIT_S = 600.0
# How many times as fast prompts are forgotten while a drift stands: they are no longer those that
# come, and fewer of the right ones, with their larger error told, are better; down to a number.
HASTE = 4.0
FEWEST_PROMPTS = 200
# Written at most this often, and at the end.
SAVE_EVERY_S = 60.0
# Palettes solved for a new version before it is served, so that no request waits for it.
_READY_PALETTES = 32
# The fewest prompts among which the share of one prompt is bounded.
_LEAST_WINDOW = 100


class Track:
    """What live traffic has told about one calibration. Used by one thread at a time.

    Parameters
    ----------
    root : Calibration
        As it was made, or a version of it.
    mode : {"on", "frozen"}
    half_life : float
    path : Path
        Where its prompts are kept; its watch is beside it.
    cache : SolutionCache
        Where solutions of a new version are put.

    Attributes
    ----------
    calibration : Calibration
        The newest version.
    monitor : Monitor
    left_out : Counter of Reason
        Requests that were no fair sample, by why.
    taken : int
        Requests that were.
    """

    def __init__(
        self, root: Calibration, mode: Mode, half_life: float, path: Path, cache: SolutionCache
    ) -> None:
        self.monitor = Monitor(root.pilot.values)
        self.left_out: Counter[Reason] = Counter()
        self.taken = 0
        self._mode = mode
        self._path = path
        self._watch_path = path.with_suffix(".watch.npz")
        self._cache = cache
        self._repeats = Repeats(max(_LEAST_WINDOW, root.pilot.n_prompts))
        self._palettes: OrderedDict[str, PaletteOptions] = OrderedDict()
        self._reservoir = Reservoir(root.root or root, half_life, np.random.default_rng())
        self._haste = min(HASTE, max(1.0, half_life / math.log(2) / FEWEST_PROMPTS))
        self._is_saved = self._is_watch_saved = True
        self._is_watch_kept = True
        self._saved = self._refreshed = time.monotonic()
        self._restore()
        self.calibration = self._reservoir.current()
        _compute(self.calibration.pilot)

    def _restore(self) -> None:
        for path in (self._path, self._watch_path):
            try:
                sweep(path)
            except OSError as error:
                logger.warning("left-overs of %s cannot be deleted: %s", path, error)
        if self._path.exists():
            try:
                self._reservoir.restore(self._path)
            except ReservoirError as error:
                _set_aside(self._path, error, "live prompts begin anew")
        if self._watch_path.exists():
            try:
                load_watch(self._watch_path, self._root_print, self.monitor)
            except WatchError as error:
                _set_aside(self._watch_path, error, "the watch over promises begins anew")

    @property
    def _root_print(self) -> str:
        """What the watch belongs to: it goes on through all versions, as it does in between."""
        return self._reservoir.root.pilot.fingerprint

    def describe(self, root: Calibration) -> None:
        """Take over the record of a calibration whose rewards are those of this one."""
        now = self.calibration
        if root.info != now.info:
            self._reservoir.root = root
            self.calibration = root if now.root is None else replace(now, info=root.info, root=root)

    def take(self, arrival: Arrival, reason: Reason | None) -> None:
        """Count one request, unless there is a reason against it."""
        if reason is None and not self._repeats.admits(arrival.plan):
            reason = "repeated"
        if reason is not None:
            self.left_out[reason] += 1
            return
        self.taken += 1
        self.monitor.take(arrival.calibration, arrival.promise, arrival.rewards)
        self._is_watch_saved = False
        options = arrival.plan.request.palette
        if self._mode == "frozen":
            return
        if options is not None and arrival.promise is not None:
            key = options.model_dump_json()
            self._palettes[key] = options.model_copy(
                update={"candidates": arrival.promise.n_candidates}
            )
            self._palettes.move_to_end(key)
            while len(self._palettes) > _READY_PALETTES:
                self._palettes.popitem(last=False)
        if len(arrival.rewards) < min(LEAST_CANDIDATES, self._reservoir.most_candidates):
            self.left_out["few_candidates"] += 1  # of the reservoir; it is watched all the same
            return
        self._reservoir.add(arrival.rewards, self._haste if self.monitor.alarmed else 1.0)
        self._is_saved = False

    @property
    def is_due(self) -> bool:
        """Whether enough is new for a new version."""
        n_new = self._reservoir.n_new
        is_late = time.monotonic() - self._refreshed >= LONGEST_WAIT_S
        n_wanted = max(LEAST_NEW, NEW_SHARE * self._reservoir.n_prompts)
        return n_new >= n_wanted or (n_new > 0 and is_late)

    def refresh(self) -> None:
        """Make a new version, with everything that its first requests would wait for."""
        calibration = self._reservoir.calibration()
        pilot = calibration.pilot
        _compute(pilot)
        for options in self._palettes.values():
            n = options.candidates
            assert isinstance(n, int)
            if n <= pilot.n_candidates:
                self._cache.solve(palette_of(options), pilot, n, max_kl=options.max_kl)
        self.calibration = calibration
        self._refreshed = time.monotonic()
        if self._refreshed - self._saved >= SAVE_EVERY_S:
            self.save()

    def tell(self) -> None:
        """Write what the watch has found, then make it known.

        In this order, a process that is killed has told of nothing that the next one does not
        know. Were alarms told first, each kill would give the same evidence one more chance of a
        false one; what is lost before it is told is as if it had not been counted.
        """
        self._save_watch()
        self.monitor.publish()

    def save(self) -> None:
        """Write what is new. A failure is told in the log: serving goes on without it."""
        self._save_watch()
        if self._is_saved:
            return
        self._saved = time.monotonic()
        try:
            self._reservoir.save(self._path)
        except (OSError, PilotError) as error:
            logger.error("live prompts are not kept: %s", error)
            return
        self._is_saved = True

    def _save_watch(self) -> None:
        if self._is_watch_saved:
            return
        try:
            save_watch(self._watch_path, self._root_print, self.monitor)
        except (OSError, PilotError) as error:
            if self._is_watch_kept:  # once, not with every request
                logger.error("the watch over promises is not kept: %s", error)
            self._is_watch_kept = False
            return
        self._is_watch_saved = self._is_watch_kept = True


def _set_aside(path: Path, error: Exception, told: str) -> None:
    aside = path.with_suffix(".damaged")
    path.replace(aside)
    logger.warning("%s; it is kept as %s, and %s", error, aside.name, told)


def _compute(pilot: PilotSet) -> None:
    """Compute what a pilot set keeps, so that the event loop finds it there."""
    _ = pilot.fingerprint, pilot.scale, pilot.correlation, pilot.quantile(0.5)
