"""One request's samples through its scorers: each where it belongs, and each failing by itself."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rewards.asking import Asking
from rewards.base import (
    BatchedScorer,
    DirectScorer,
    FloatArray,
    JudgedScorer,
    Sample,
    Scorer,
    as_rows,
)
from rewards.batcher import Batcher, Work
from rewards.cache import ScoreCache
from rewards.errors import HungError, ScoringError
from rewards.health import ScorerHealth
from rewards.judging import Asked, Judging
from rewards.lane import Lane
from rewards.trials import Trials

Result = TypeVar("Result")


@dataclass(slots=True)
class Outcome:
    """What the scorers gave, by name; each is in one of the two.

    Attributes
    ----------
    scores : dict of str to ndarray, shape (n_samples, n_outputs)
    failures : dict of str to ScoringError
    asked : Asked
        What the chat model was asked for it.
    """

    scores: dict[str, FloatArray] = field(default_factory=dict)
    failures: dict[str, ScoringError] = field(default_factory=dict)
    asked: Asked = field(default_factory=Asked)


class Runner:
    """Runs scorers: on the text thread, on threads of their own, in batches, or through the judge.

    Parameters
    ----------
    names : iterable of str
        Of all scorers.
    cache_entries, queue_tokens : int
    timeout_s : float
        Longest forward pass, and longest call of a scorer with threads of its own.

    Attributes
    ----------
    batcher : Batcher
    """

    def __init__(
        self, names: Iterable[str], *, cache_entries: int, queue_tokens: int, timeout_s: float
    ) -> None:
        self._health = {name: ScorerHealth() for name in dict.fromkeys(names)}
        self._timeout_s = timeout_s
        self._scorers: dict[str, Scorer] = {}
        self._lanes: dict[str, Lane] = {}
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="rewards-text")
        self._trials = Trials(self._try, self._health)
        cache = ScoreCache(cache_entries)
        self._asking = Asking(cache, self._health)
        self.batcher = Batcher(
            self._text_thread,
            cache,
            self._health,
            max_tokens=queue_tokens,
            timeout_s=timeout_s,
            on_failure=self._trials.begin,
        )

    def use(self, scorers: Mapping[str, Scorer]) -> None:
        """Take over loaded scorers."""
        self._scorers = dict(scorers)
        for scorer in scorers.values():
            if isinstance(scorer, DirectScorer) and scorer.n_threads:
                limit = self._timeout_s + scorer.patience_s
                self._lanes[scorer.name] = Lane(f"rewards-{scorer.name}", scorer.n_threads, limit)

    def close(self) -> None:
        """Fail what is in flight; what is being prepared then finds the batcher closed."""
        self._trials.close()
        self.batcher.close()
        self._asking.close()
        self._text_thread.shutdown(wait=False)
        for lane in self._lanes.values():
            lane.close()

    def health(self) -> dict[str, dict[str, object]]:
        """Return state and counters by scorer."""
        return {
            name: health.report(is_hung=self._is_hung(name))
            for name, health in self._health.items()
        }

    def judging(self) -> dict[str, Judging]:
        """Return what the chat model was asked, by scorer that has asked something."""
        return {
            name: judging
            for name, judging in self._asking.judging.items()
            if judging.asked.n_questions
        }

    async def run(
        self,
        samples: Sequence[Sample],
        names: Collection[str],
        *,
        may_fail: Collection[str] = (),
        more: bool = False,
    ) -> Outcome:
        """Return what these scorers give.

        Parameters
        ----------
        samples : sequence of Sample
        names, may_fail : collection of str
            The scorers, and those of them whose failure is returned instead of raised.
        more : bool
            See `Batcher.score`.

        Raises
        ------
        ScoringError
            The first failure of a scorer that may not fail.
        RewardError
            When the suite is closed, or its queue full.
        """
        samples = list(samples)
        asked = Asked()
        apart = {
            name: asyncio.ensure_future(scoring)
            for name in names
            if (scoring := self._apart(samples, name, asked)) is not None
        }
        here = [self._scorers[name] for name in names if name not in apart]
        try:
            outcome, work = await self._prepared(samples, here)
            for name, error in outcome.failures.items():
                if name not in may_fail:
                    raise error
            found = await self.batcher.score(work, may_fail=may_fail, more=more)
            for piece, rows in zip(work, found, strict=True):
                if isinstance(rows, ScoringError):
                    outcome.failures[piece.scorer.name] = rows
                else:
                    outcome.scores[piece.scorer.name] = rows
            for name, task in apart.items():
                try:
                    outcome.scores[name] = await task
                except ScoringError as error:
                    if name not in may_fail:
                        raise
                    outcome.failures[name] = error
        finally:
            for task in apart.values():
                task.cancel()
            await asyncio.gather(*apart.values(), return_exceptions=True)  # seen: no stray errors
        outcome.asked = asked
        return outcome

    def _apart(
        self, samples: list[Sample], name: str, asked: Asked
    ) -> Coroutine[Any, Any, FloatArray] | None:
        """Return the work of a scorer that needs neither the text thread nor the device."""
        scorer = self._scorers[name]
        if isinstance(scorer, JudgedScorer):
            return self._asking.score(scorer, samples, asked)
        return self._in_lane(samples, name) if name in self._lanes else None

    async def _in_lane(self, samples: list[Sample], name: str) -> FloatArray:
        """Return the scores of a scorer with threads of its own."""
        scorer = self._scorers[name]
        assert isinstance(scorer, DirectScorer)
        score = functools.partial(_guarded, scorer, functools.partial(_score, scorer, samples))
        try:
            rows = await self._lanes[name].run(score)
        except HungError as error:
            failure = ScoringError(name, scorer.values, str(error))
            self._failed(failure)
            raise failure from error
        except ScoringError as error:
            self._failed(error)
            raise
        self._health[name].counted(len(samples))
        return rows

    async def _prepared(
        self, samples: list[Sample], scorers: list[Scorer]
    ) -> tuple[Outcome, list[Work]]:
        """Return what needs no model, scored, and the rest, rendered; on the text thread."""
        loop = asyncio.get_running_loop()
        outcome, work = await loop.run_in_executor(self._text_thread, _prepare, samples, scorers)
        for name in outcome.scores:
            self._health[name].counted(len(samples))
        for error in outcome.failures.values():
            self._failed(error)
        return outcome, work

    def _failed(self, error: ScoringError) -> None:
        """Note a failure that may be the sample's own; a trial tells."""
        self._health[error.scorer].last_error = str(error)
        if self._scorers[error.scorer].trial() is not None:
            self._trials.begin(error.scorer)

    async def _try(self, name: str) -> None:
        """Score the trial sample of a scorer."""
        sample = self._scorers[name].trial()
        assert sample is not None
        if name in self._lanes:
            await self._in_lane([sample], name)
            return
        outcome, work = await self._prepared([sample], [self._scorers[name]])
        for error in outcome.failures.values():
            raise error
        # Under a key that is not in the cache: the model is asked, not the memory.
        await self.batcher.score([replace(piece, keys=[os.urandom(16)]) for piece in work])

    def _is_hung(self, name: str) -> bool:
        scorer = self._scorers.get(name)
        if isinstance(scorer, BatchedScorer):
            return self.batcher.worker.is_hung(scorer)
        return name in self._lanes and self._lanes[name].is_hung


def _prepare(samples: list[Sample], scorers: list[Scorer]) -> tuple[Outcome, list[Work]]:
    """Score directly what needs no model, and render the rest; on the text thread."""
    outcome, work = Outcome(), []
    for scorer in scorers:
        try:
            if isinstance(scorer, DirectScorer):
                score = functools.partial(_score, scorer, samples)
                outcome.scores[scorer.name] = _guarded(scorer, score)
            elif isinstance(scorer, BatchedScorer):
                work.append(_guarded(scorer, functools.partial(_render, scorer, samples)))
        except ScoringError as error:
            outcome.failures[scorer.name] = error
    return outcome, work


def _guarded(scorer: Scorer, function: Callable[[], Result]) -> Result:
    """Return what a function returns; whatever it raises is a failure of the scorer."""
    try:
        return function()
    except ScoringError:
        raise
    except Exception as error:
        problem = f"the sample cannot be prepared: {type(error).__name__}: {error}"
        raise ScoringError(scorer.name, scorer.values, problem) from error


def _score(scorer: DirectScorer, samples: list[Sample]) -> FloatArray:
    return as_rows(scorer.score(samples), len(samples), len(scorer.outputs))


def _render(scorer: BatchedScorer, samples: list[Sample]) -> Work:
    rendered = [scorer.render(sample) for sample in samples]
    return Work(scorer, [_key(item) for item in rendered], rendered)


def _key(rendered: object) -> bytes:
    """Return 16 bytes that are equal for equal renderings; the texts would fill the memory."""
    return hashlib.blake2b(repr(rendered).encode(), digest_size=16).digest()
