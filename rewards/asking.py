"""Judged scores in flight: equal samples are asked about once, whoever waits for them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.base import FloatArray, JudgedScorer, Sample
from rewards.cache import ScoreCache
from rewards.errors import RewardError, ScoringError
from rewards.health import ScorerHealth


@dataclass(slots=True, eq=False)
class _Asked:
    """A sample that the model is asked about, and how many wait for it."""

    work: asyncio.Task[FloatArray]
    n_waiting: int = 0


class Asking:
    """Asks the judge of all requests.

    Parameters
    ----------
    cache : ScoreCache
    health : dict of str to ScorerHealth
        By scorer name; counted here.

    Notes
    -----
    Used from one event loop at a time, so the books need no lock. How many questions run at once
    is the judge's business.
    """

    def __init__(self, cache: ScoreCache, health: dict[str, ScorerHealth]) -> None:
        self._cache = cache
        self._health = health
        self._in_flight: dict[tuple[str, bytes], _Asked] = {}

    async def score(self, scorer: JudgedScorer, samples: Sequence[Sample]) -> FloatArray:
        """Return the outputs, shape (n_samples, n_outputs).

        Cancelling it stops the work on those samples that nobody else waits for.

        Raises
        ------
        ScoringError
            When a sample could not be judged.
        """
        waiting = [asyncio.ensure_future(self._score_one(scorer, sample)) for sample in samples]
        try:
            return np.stack(await asyncio.gather(*waiting))
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)  # seen: no stray errors

    def close(self) -> None:
        """Stop all work; whoever waits for it gets `RewardError`."""
        for asked in self._in_flight.values():
            asked.work.cancel()

    async def _score_one(self, scorer: JudgedScorer, sample: Sample) -> FloatArray:
        key = (scorer.name, _key(sample))
        known = self._cache.get(*key)
        asked = self._in_flight.get(key)
        if known is not None or asked is not None:
            self._health[scorer.name].n_duplicates += 1
        if known is not None:
            return known
        if asked is None:
            asked = _Asked(asyncio.ensure_future(self._ask(scorer, sample, key)))
            self._in_flight[key] = asked
        asked.n_waiting += 1
        try:
            await asyncio.wait({asked.work})
        finally:
            asked.n_waiting -= 1
            if not asked.n_waiting:
                if self._in_flight.get(key) is asked:
                    del self._in_flight[key]
                asked.work.cancel()
                if asked.work.done() and not asked.work.cancelled():
                    asked.work.exception()  # seen: a failure that races a cancellation
        if asked.work.cancelled():
            raise RewardError("the reward suite was closed while it was scoring")
        return asked.work.result()

    async def _ask(
        self, scorer: JudgedScorer, sample: Sample, key: tuple[str, bytes]
    ) -> FloatArray:
        health = self._health[scorer.name]
        try:
            scores = await scorer.ask(sample)
        except ValueError as error:
            # What one sample lacks does not make the scorer fail for others.
            health.last_error = f"a sample cannot be judged: {error}"
            raise ScoringError(scorer.name, scorer.values, health.last_error) from error
        except Exception as error:
            problem = f"asking the chat model failed with {type(error).__name__}: {error}"
            health.failed(problem)
            raise ScoringError(scorer.name, scorer.values, problem) from error
        if not np.isfinite(scores).all():
            bad = scores[~np.isfinite(scores)][0]
            problem = f"the chat model gave {bad}, which is no score; check its weights and dtype"
            health.failed(problem)
            raise ScoringError(scorer.name, scorer.values, problem)
        health.counted(1)
        self._cache.put(*key, scores)
        return scores


def _key(sample: Sample) -> bytes:
    """Return 16 bytes that are equal for samples that are read alike."""
    read: object = (sample.prompt_ids, sample.answer_ids)
    if sample.prompt_ids is None or sample.answer_ids is None:
        read = (sample.messages, sample.answer)
    return hashlib.blake2b(repr(read).encode(), digest_size=16).digest()
