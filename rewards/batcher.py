"""Cross-request micro-batching: requests hand in inputs, and await their scores.

Who does what: the event loop keeps the books (who waits for which input, scores known already);
the text thread encodes; the device thread (`worker.py`) chooses batches and runs them. Each
distinct input is encoded and scored once, however many requests wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from rewards.base import BatchedScorer, FloatArray, Rendered
from rewards.batch import Entry
from rewards.cache import ScoreCache
from rewards.errors import RewardError, ScoringError
from rewards.health import ScorerHealth
from rewards.worker import Worker


@dataclass(frozen=True, slots=True)
class Work:
    """The inputs of one request for one scorer; ``keys[i]`` belongs to ``rendered[i]``."""

    scorer: BatchedScorer
    keys: Sequence[bytes]
    rendered: Sequence[Rendered]


@dataclass(slots=True, eq=False)
class _Request:
    """Somebody who waits for scores: done when none is missing, or failed by the first failure."""

    done: asyncio.Future[None]
    entries: list[Entry[_Request]] = field(default_factory=list)
    n_missing: int = 0


class Batcher:
    """Scores the inputs of all requests in flight together.

    Parameters
    ----------
    text_thread : Executor
        Encodes; one thread, because a tokenizer is not safe in two.
    cache : ScoreCache
    health : dict of str to ScorerHealth
        By scorer name; the batcher counts here.

    Notes
    -----
    Used from one event loop at a time. The books (``_in_flight``, waiters, cache) are touched on
    that loop only, so they need no lock.
    """

    def __init__(
        self, text_thread: Executor, cache: ScoreCache, health: dict[str, ScorerHealth]
    ) -> None:
        self.worker: Worker[_Request] = Worker(self._on_batch)
        self._text_thread = text_thread
        self._cache = cache
        self._health = health
        self._in_flight: dict[tuple[str, bytes], Entry[_Request]] = {}
        self._n_created = 0
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def score(self, work: Sequence[Work]) -> list[FloatArray]:
        """Return the scores of each piece of work, shape (n_inputs, n_outputs).

        Raises
        ------
        ScoringError
            When the forward pass of one of these inputs failed, or its score is not finite.
        RewardError
            When the batcher is closed meanwhile.

        Notes
        -----
        A caller that is cancelled takes its queued inputs along, but for those that somebody else
        waits for too.
        """
        self.check_open()
        self._loop = asyncio.get_running_loop()
        request = _Request(self._loop.create_future())
        scores = [np.full((len(piece.keys), len(piece.scorer.outputs)), np.nan) for piece in work]
        places: list[tuple[FloatArray, int, Entry[_Request]]] = []
        try:
            for piece, column in zip(work, scores, strict=True):
                places += self._enter(request, piece, column)
            if request.n_missing:
                await request.done
        finally:
            self._withdraw(request)
        for rows, row, entry in places:
            assert entry.score is not None  # none is missing
            rows[row] = entry.score
        return scores

    def check_open(self) -> None:
        """Raise RewardError once closed."""
        if self._is_closed:
            raise RewardError("the reward suite is closed; load it again to score")

    def close(self) -> None:
        """Stop the device thread and fail whoever still waits."""
        self._is_closed = True
        self.worker.close()
        for entry in list(self._in_flight.values()):
            self._fail(entry, RewardError("the reward suite was closed while it was scoring"))

    def _enter(
        self, request: _Request, piece: Work, column: FloatArray
    ) -> list[tuple[FloatArray, int, Entry[_Request]]]:
        """Fill in the known scores, join the entries in flight, create and send the others."""
        name = piece.scorer.name
        health = self._health[name]
        places = []
        created = []
        joined = set()
        for row, (key, rendered) in enumerate(zip(piece.keys, piece.rendered, strict=True)):
            known = self._cache.get(name, key)
            if known is not None:
                column[row] = known
                health.n_duplicates += 1
                continue
            entry = self._in_flight.get((name, key))
            if entry is None:
                entry = Entry(piece.scorer, key, self._n_created, rendered)
                self._n_created += 1
                self._in_flight[name, key] = entry
                created.append(entry)
            else:
                health.n_duplicates += 1
            if key not in joined:
                joined.add(key)
                entry.waiters.append(request)
                request.entries.append(entry)
                request.n_missing += 1
            places.append((column, row, entry))
        if created:
            self._text_thread.submit(self._encode, created)
        return places

    def _encode(self, entries: list[Entry[_Request]]) -> None:
        """Encode and queue entries; on the text thread."""
        wanted = [entry for entry in entries if entry.waiters]  # some may have left meanwhile
        if not wanted:
            return
        try:
            tokens = wanted[0].scorer.encode([entry.rendered for entry in wanted])
        except Exception as error:  # noqa: BLE001 - any failure belongs to those who wait for it
            self._on_batch(wanted, error)
            return
        for entry, encoded in zip(wanted, tokens, strict=True):
            entry.tokens = encoded
        self.worker.add(entry for entry in wanted if entry.waiters)

    def _on_batch(self, batch: list[Entry[_Request]], outcome: FloatArray | Exception) -> None:
        """Carry the outcome of a batch to the event loop, in one hop; on the device thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(self._settle, batch, outcome)

    def _settle(self, batch: list[Entry[_Request]], outcome: FloatArray | Exception) -> None:
        """Book the outcome of a batch and wake whoever has all its scores; on the loop."""
        scorer = batch[0].scorer
        health = self._health[scorer.name]
        if isinstance(outcome, Exception):
            health.failed(f"{type(outcome).__name__}: {outcome}")
            for entry in batch:
                self._fail(entry, _scoring_error(scorer, outcome))
            return
        health.ran([len(entry) for entry in batch])
        for entry, score in zip(batch, outcome, strict=True):
            if not np.isfinite(score).all():
                bad = score[~np.isfinite(score)][0]
                problem = f"the model gave {bad}, which is no score; check its weights and dtype"
                health.failed(problem)
                self._fail(entry, ScoringError(scorer.name, scorer.values, problem))
                continue
            entry.score = score.copy()  # not a view, which would keep the whole batch
            self._cache.put(scorer.name, entry.key, score)
            self._forget(entry)
            for request in entry.waiters:
                request.n_missing -= 1
                if request.n_missing == 0 and not request.done.done():
                    request.done.set_result(None)

    def _fail(self, entry: Entry[_Request], error: RewardError) -> None:
        self._forget(entry)
        for request in entry.waiters:
            if not request.done.done():
                request.done.set_exception(error)

    def _forget(self, entry: Entry[_Request]) -> None:
        """Let later requests for the same input start anew; a newer entry for it stays."""
        place = (entry.scorer.name, entry.key)
        if self._in_flight.get(place) is entry:
            del self._in_flight[place]

    def _withdraw(self, request: _Request) -> None:
        """Take a request off its entries; those that nobody waits for any more are dropped."""
        abandoned = []
        for entry in request.entries:
            entry.waiters.remove(request)
            if not entry.waiters:
                abandoned.append(entry)
                self._forget(entry)
        if abandoned:
            self.worker.discard(abandoned)
        if request.done.done() and not request.done.cancelled():
            request.done.exception()  # seen: a failure that races a cancellation is no stray error


def _scoring_error(scorer: BatchedScorer, error: Exception) -> RewardError:
    """Return what the requests of a failed batch are told."""
    if isinstance(error, ScoringError):
        return error
    problem = f"scoring failed with {type(error).__name__}: {error}"
    failure = ScoringError(scorer.name, scorer.values, problem)
    failure.__cause__ = error
    return failure
