"""Follows the answers served: off the event loop, one batch at a time, and swaps calibrations."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from server.alignment import Aligner
from server.alignment_stages import Served
from server.calibration import Calibration
from server.live.intake import Arrival, arrival_of, reason_against
from server.live.track import Mode, Track
from server.shelf import UnknownCalibrationError

logger = logging.getLogger(__name__)

# Arrivals that wait to be counted; the oldest are dropped beyond.
_MOST_WAITING = 1024
# Seconds between two batches: each is written to the disk, so what comes meanwhile waits.
_PACE_S = 1.0


class Follower:
    """Keeps an aligner's calibration true to what is asked of it.

    `observe` only appends to a queue. A task takes what has gathered to a thread, counts it, makes
    a new version when it is due, and puts it in place of the old one in one assignment. State is
    kept by the root calibration's id, so that one aligner can serve with several.

    Parameters
    ----------
    aligners : iterable of Aligner
        That of a model, and those of its adapters.
    mode : {"on", "frozen"}
    half_life : float
        Live requests after which half of a calibration is renewed.
    folder : Path
        Where reservoirs are kept, a file for each root calibration. Two servers must not share it.

    Attributes
    ----------
    mode, half_life
    """

    def __init__(
        self, aligners: Iterable[Aligner], mode: Mode, half_life: float, folder: Path
    ) -> None:
        self.mode: Mode = mode
        self.half_life = half_life
        self._aligners = tuple(aligners)
        self._folder = folder
        self._tracks: dict[str, Track] = {}
        self._lock = threading.Lock()  # for all that opens, uses or drops a track
        self._waiting: deque[tuple[Aligner, Arrival]] = deque(maxlen=_MOST_WAITING)
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._hurry = asyncio.Event()
        self._is_stopping = False
        for aligner in self._aligners:
            aligner.doubts = self.doubts
            aligner.observers.append(functools.partial(self._observe, aligner))

    def _observe(self, aligner: Aligner, served: Served) -> None:
        """Note an answer."""
        arrival = arrival_of(served)
        if arrival is not None:
            self._waiting.append((aligner, arrival))
            self._idle.clear()
            self._wake.set()

    def doubts(self, calibration: Calibration) -> Iterable[str]:
        """Return a sentence for each drift that is found."""
        track = self._tracks.get(calibration.id)
        return () if track is None else track.monitor.warnings

    def track(self, calibration: Calibration) -> Track | None:
        """Return the live state of a calibration, once there is any."""
        return self._tracks.get(calibration.id)

    def tracks(self) -> dict[str, Track]:
        """Return all live states, by the root calibration's id."""
        return dict(self._tracks)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take up what was kept, follow until the end, and keep what is new."""
        for aligner in self._aligners:
            for held in aligner.shelf.held:
                self._swap(await asyncio.to_thread(self._open, held.calibration))
        task = asyncio.create_task(self._follow(), name="follow")
        try:
            yield
        finally:
            self._is_stopping = True
            self._wake.set()
            self._hurry.set()
            await task
            for track in self._tracks.values():
                await asyncio.to_thread(track.save)

    async def settled(self) -> None:
        """Return once everything observed so far is counted and swapped in."""
        self._hurry.set()
        await self._idle.wait()

    async def _follow(self) -> None:
        while not self._is_stopping or self._waiting:
            await self._wake.wait()
            self._wake.clear()
            batch = list(self._waiting)
            self._waiting.clear()
            try:
                for track in await asyncio.to_thread(self._take, batch):
                    self._swap(track)
            except Exception:  # whatever it was, answers must go on
                logger.exception("live requests could not be followed")
            if not self._waiting:
                self._idle.set()
                self._hurry.clear()
            if not self._is_stopping:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PACE_S):
                        await self._hurry.wait()

    def _swap(self, track: Track) -> None:
        """Serve with the newest version; the only place that puts one in place of another."""
        newest = track.calibration
        for aligner in self._aligners:
            served = {one.calibration.id: one.calibration.version for one in aligner.shelf.held}
            if served.get(newest.id, newest.version) != newest.version:
                try:
                    aligner.shelf.replace(newest.id, newest)
                except UnknownCalibrationError:
                    return  # it was deleted meanwhile
                break
        else:
            return
        logger.info(
            "calibration %s is at version %d: %d prompts, %d of them live",
            newest.id, newest.version, newest.pilot.n_prompts, newest.live_prompts,
        )  # fmt: skip

    def _take(self, batch: list[tuple[Aligner, Arrival]]) -> list[Track]:
        """Count a batch; return the states with a version that is not served yet."""
        touched: dict[str, Track] = {}
        with self._lock:
            held = self._held()
            for aligner, arrival in batch:
                if arrival.calibration.id not in held:
                    continue  # it is deleted since
                track = self._open(arrival.calibration)
                model, rewards = aligner.backend.fingerprint, aligner.rewards.fingerprint
                track.take(arrival, reason_against(arrival, model, rewards))
                touched[arrival.calibration.id] = track
            for track in touched.values():
                track.tell()
                if track.is_due:
                    track.refresh()
        return list(touched.values())

    def newest(self, calibration: Calibration) -> Calibration:
        """Return the version of a calibration to be served from now on; waits for the disk."""
        with self._lock:
            track = self._open(calibration)
            track.describe(calibration)
            return track.calibration

    def let_go(self) -> None:
        """Keep what is known of calibrations that nobody serves with any more, and forget it."""
        with self._lock:
            for name in self._tracks.keys() - self._held():
                self._tracks[name].save()
                del self._tracks[name]

    def _held(self) -> set[str]:
        return {one.calibration.id for aligner in self._aligners for one in aligner.shelf.held}

    def _open(self, calibration: Calibration) -> Track:
        track = self._tracks.get(calibration.id)
        if track is None:
            track = Track(
                calibration,
                self.mode,
                self.half_life,
                self._folder / f"{calibration.id}.npz",
                self._aligners[0].promiser.cache,
            )
            self._tracks[calibration.id] = track
        return track
