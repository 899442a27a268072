"""Cross-request micro-batching: requests hand in inputs, and await their scores.

Who does what: the event loop keeps the books (who waits for which input, scores known already);
the text thread encodes; the device thread (`worker.py`) chooses batches and runs them. Each
distinct input is encoded and scored once, however many requests wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from rewards.base import BatchedScorer, FloatArray, Rendered
from rewards.batch import Entry
from rewards.cache import ScoreCache
from rewards.errors import HungError, RewardError, RewardQueueFullError, ScoringError
from rewards.health import ScorerHealth
from rewards.worker import Worker

# Of a text, for its size before it is encoded. English has four to five a token.
_LETTERS_PER_TOKEN = 3
# After a full queue. At a thousand tokens a second, what a small CPU does, a request is through.
_RETRY_AFTER_S = 5


@dataclass(frozen=True, slots=True)
class Work:
    """The inputs of one request for one scorer; ``keys[i]`` belongs to ``rendered[i]``."""

    scorer: BatchedScorer
    keys: Sequence[bytes]
    rendered: Sequence[Rendered]


@dataclass(slots=True, eq=False)
class _Request:
    """Somebody who waits for scores: done when none is missing, or failed by the first failure.

    Of the scorers in ``may_fail``, by name, failures are noted instead.
    """

    done: asyncio.Future[None]
    may_fail: Collection[str]
    failures: dict[str, ScoringError] = field(default_factory=dict)
    entries: list[Entry[_Request]] = field(default_factory=list)
    n_missing: int = 0

    def arrived(self) -> None:
        """Count one of the entries."""
        self.n_missing -= 1
        if self.n_missing == 0 and not self.done.done():
            self.done.set_result(None)


class Batcher:
    """Scores the inputs of all requests in flight together.

    Parameters
    ----------
    text_thread : Executor
        Encodes; one thread, because a tokenizer is not safe in two.
    cache : ScoreCache
    health : dict of str to ScorerHealth
        By scorer name; the batcher counts here.
    max_tokens : int
        Of inputs that may wait, about; more are refused.
    timeout_s : float
        Longest forward pass.
    on_failure : callable
        Gets the name of a scorer whose forward pass failed, on the event loop.

    Notes
    -----
    Used from one event loop at a time. The books (``_in_flight``, waiters, cache) are touched on
    that loop only, so they need no lock.
    """

    def __init__(
        self,
        text_thread: Executor,
        cache: ScoreCache,
        health: dict[str, ScorerHealth],
        *,
        max_tokens: int,
        timeout_s: float,
        on_failure: Callable[[str], None],
    ) -> None:
        self.worker: Worker[_Request] = Worker(self._on_batch, timeout_s)
        self._max_tokens = max_tokens
        self._n_tokens = 0
        self._on_failure = on_failure
        self._text_thread = text_thread
        self._cache = cache
        self._health = health
        self._in_flight: dict[tuple[str, bytes], Entry[_Request]] = {}
        self._n_created = 0
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def score(
        self, work: Sequence[Work], *, may_fail: Collection[str] = (), more: bool = False
    ) -> list[FloatArray | ScoringError]:
        """Return the scores of each piece of work, shape (n_inputs, n_outputs).

        Parameters
        ----------
        work : sequence of Work
        may_fail : collection of str
            Scorers whose failure is returned instead of raised.
        more : bool
            More inputs for the same answer come soon, so that these may wait for them.

        Raises
        ------
        ScoringError
            When the forward pass of one of these inputs failed, or its score is not finite.
        RewardQueueFullError
            When more inputs wait already than may.
        RewardError
            When the batcher is closed meanwhile.

        Notes
        -----
        A caller that is cancelled takes its queued inputs along, but for those that somebody else
        waits for too.
        """
        self.check_open()
        self._loop = asyncio.get_running_loop()
        request = _Request(self._loop.create_future(), may_fail)
        scores = [np.full((len(piece.keys), len(piece.scorer.outputs)), np.nan) for piece in work]
        places: list[tuple[FloatArray, int, Entry[_Request]]] = []
        try:
            for piece, column in zip(work, scores, strict=True):
                places += self._enter(request, piece, column, more=more)
            if not more and any(piece.scorer.linger_s for piece in work):
                # Behind what is being encoded: nothing waits for an answer's inputs any more.
                self._text_thread.submit(self.worker.flush)
            if request.n_missing:
                await request.done
        finally:
            self._withdraw(request)
        for rows, row, entry in places:
            if entry.score is not None:  # its scorer failed otherwise
                rows[row] = entry.score
        return [
            request.failures.get(piece.scorer.name, rows)
            for piece, rows in zip(work, scores, strict=True)
        ]

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
        self, request: _Request, piece: Work, column: FloatArray, *, more: bool
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
                entry = Entry(
                    piece.scorer, key, self._n_created, rendered, _size_of(piece.scorer, rendered)
                )
                self._make_room(entry)
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
            self._text_thread.submit(self._encode, created, piece.scorer.linger_s if more else 0.0)
        return places

    def _make_room(self, entry: Entry[_Request]) -> None:
        """Count a new entry, or refuse it; where nothing waits, the largest finds room."""
        if self._n_tokens and self._n_tokens + entry.size > self._max_tokens:
            msg = (
                f"{len(self._in_flight)} texts wait for the reward models already, about "
                f"{self._n_tokens} tokens, and {self._max_tokens} may; try again later"
            )
            raise RewardQueueFullError(msg, _RETRY_AFTER_S)
        self._n_tokens += entry.size

    def _encode(self, entries: list[Entry[_Request]], linger_s: float) -> None:
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
        self.worker.add((entry for entry in wanted if entry.waiters), linger_s)

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
            self._on_failure(scorer.name)
            for entry in batch:
                self._fail(entry, _scoring_error(scorer, outcome))
            return
        health.ran([len(entry) for entry in batch])
        for entry, score in zip(batch, outcome, strict=True):
            if not np.isfinite(score).all():
                bad = score[~np.isfinite(score)][0]
                problem = f"the model gave {bad}, which is no score; check its weights and dtype"
                health.failed(problem)
                self._on_failure(scorer.name)
                self._fail(entry, ScoringError(scorer.name, scorer.values, problem))
                continue
            entry.score = score.copy()  # not a view, which would keep the whole batch
            self._cache.put(scorer.name, entry.key, score)
            self._forget(entry)
            for request in entry.waiters:
                request.arrived()

    def _fail(self, entry: Entry[_Request], error: RewardError) -> None:
        self._forget(entry)
        for request in entry.waiters:
            if isinstance(error, ScoringError) and error.scorer in request.may_fail:
                request.failures.setdefault(error.scorer, error)
                request.arrived()
            elif not request.done.done():
                request.done.set_exception(error)

    def _forget(self, entry: Entry[_Request]) -> None:
        """Let later requests for the same input start anew; a newer entry for it stays."""
        place = (entry.scorer.name, entry.key)
        if self._in_flight.get(place) is entry:
            del self._in_flight[place]
            self._n_tokens -= entry.size

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


def _size_of(scorer: BatchedScorer, rendered: Rendered) -> int:
    """Return about how many tokens a text has, at most what the model takes."""
    n_letters = len(rendered.text) + len(rendered.first or "")
    return min(scorer.max_length, 1 + n_letters // _LETTERS_PER_TOKEN)


def _scoring_error(scorer: BatchedScorer, error: Exception) -> ScoringError:
    """Return what the requests of a failed batch are told."""
    if isinstance(error, ScoringError):
        return error
    problem = f"scoring failed with {type(error).__name__}: {error}"
    if isinstance(error, HungError):
        problem = str(error)
    failure = ScoringError(scorer.name, scorer.values, problem)
    failure.__cause__ = error
    return failure
