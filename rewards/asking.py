"""Judged scores in flight: equal samples are asked about once, whoever waits for them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.base import FloatArray, Judged, JudgedScorer, Sample
from rewards.cache import ScoreCache
from rewards.errors import RewardError, ScoringError
from rewards.health import ScorerHealth
from rewards.judging import Asked, Judging, asked_for


@dataclass(slots=True, eq=False)
class _Asking:
    """A sample that the model is asked about, and how many wait for it."""

    work: asyncio.Task[Judged]
    n_waiting: int = 0


class Asking:
    """Asks the judge of all requests.

    Parameters
    ----------
    cache : ScoreCache
    health : dict of str to ScorerHealth
        By scorer name; counted here.

    Attributes
    ----------
    judging : dict of str to Judging
        By scorer name.

    Notes
    -----
    Used from one event loop at a time, so the books need no lock. How many questions run at once
    is the judge's business.
    """

    def __init__(self, cache: ScoreCache, health: dict[str, ScorerHealth]) -> None:
        self._cache = cache
        self._health = health
        self._in_flight: dict[tuple[str, bytes], _Asking] = {}
        self.judging = {scorer: Judging(scorer) for scorer in health}

    async def score(
        self, scorer: JudgedScorer, samples: Sequence[Sample], asked: Asked
    ) -> FloatArray:
        """Return the outputs, shape (n_samples, n_outputs).

        What had to be asked for it is added to `asked`: not what was known, or in flight for
        somebody else. Cancelling it stops the work on those samples that nobody else waits for.

        Raises
        ------
        ScoringError
            When a sample could not be judged.
        """
        waiting = [
            asyncio.ensure_future(self._score_one(scorer, sample, asked)) for sample in samples
        ]
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

    async def _score_one(self, scorer: JudgedScorer, sample: Sample, told: Asked) -> FloatArray:
        key = (scorer.name, _key(sample))
        known = self._cache.get(*key)
        asking = self._in_flight.get(key)
        if known is not None or asking is not None:
            self._health[scorer.name].n_duplicates += 1
        if known is not None:
            return known
        is_first = asking is None
        if asking is None:
            asking = _Asking(asyncio.ensure_future(self._ask(scorer, sample, key)))
            self._in_flight[key] = asking
        asking.n_waiting += 1
        try:
            await asyncio.wait({asking.work})
        finally:
            asking.n_waiting -= 1
            if not asking.n_waiting:
                if self._in_flight.get(key) is asking:
                    del self._in_flight[key]
                asking.work.cancel()
                if asking.work.done() and not asking.work.cancelled():
                    asking.work.exception()  # seen: a failure that races a cancellation
        if asking.work.cancelled():
            raise RewardError("the reward suite was closed while it was scoring")
        judged = asking.work.result()
        if is_first:
            told.add(asked_for(judged))
        return judged.scores

    async def _ask(self, scorer: JudgedScorer, sample: Sample, key: tuple[str, bytes]) -> Judged:
        health = self._health[scorer.name]
        try:
            judged = await scorer.ask(sample)
        except ValueError as error:
            # What one sample lacks does not make the scorer fail for others.
            health.last_error = f"a sample cannot be judged: {error}"
            raise ScoringError(scorer.name, scorer.values, health.last_error) from error
        except Exception as error:
            problem = f"asking the chat model failed with {type(error).__name__}: {error}"
            health.failed(problem)
            raise ScoringError(scorer.name, scorer.values, problem) from error
        scores = judged.scores
        if not np.isfinite(scores).all():
            bad = scores[~np.isfinite(scores)][0]
            problem = f"the chat model gave {bad}, which is no score; check its weights and dtype"
            health.failed(problem)
            raise ScoringError(scorer.name, scorer.values, problem)
        health.counted(1)
        self.judging[scorer.name].add(judged)
        self._cache.put(*key, scores)
        return judged


def _key(sample: Sample) -> bytes:
    """Return 16 bytes that are equal for samples that are read alike."""
    read: object = (sample.prompt_ids, sample.answer_ids)
    if sample.prompt_ids is None or sample.answer_ids is None:
        read = (sample.messages, sample.answer)
    return hashlib.blake2b(repr(read).encode(), digest_size=16).digest()
