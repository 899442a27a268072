"""All rewards of a server: samples in, a matrix of numbers out."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from rewards.asking import Asking
from rewards.base import (
    BatchedScorer,
    DirectScorer,
    FloatArray,
    Judge,
    JudgedScorer,
    Sample,
    Scorer,
    Value,
    as_rows,
)
from rewards.batch import BatchLimits
from rewards.batcher import Batcher, Work
from rewards.cache import ScoreCache
from rewards.columns import Column
from rewards.config_file import FieldPath, suggest
from rewards.errors import RewardConfigError, RewardError, ScoringError
from rewards.health import ScorerHealth
from rewards.identity import hash_json

_CLOSE_TIMEOUT_S = 10.0


class RewardSuite:
    """The values of a rewards file and the scorers behind them. Made by `load_rewards`.

    ``await start()``, ``await score(...)`` from one event loop as often and as concurrently as
    needed, ``await close()``; or ``async with``. Without asyncio: ``with`` and `score_sync`.

    Attributes
    ----------
    values : tuple of Value
        In the order of the file, which is the order of the columns everywhere.
    names : tuple of str
        Their names.
    columns : tuple of str
        All that can be scored: the names, then what is only watched.
    watches : dict of str to str
        Value -> the column of its held-out scorer, which nobody optimises.
    needs_judge : bool
        Whether some are judged by the chat model, so that ``use_judge`` must come before ``start``.
    """

    def __init__(
        self,
        *,
        values: Sequence[Value],
        columns: Sequence[Column],
        watches: Mapping[str, str],
        build: Callable[[], list[Scorer]],
        refuse: Callable[[FieldPath, str], RewardConfigError],
        device: str,
        max_batch_tokens: int | None,
        cache_entries: int,
        torch_threads: int | None,
        needs_judge: bool = False,
    ) -> None:
        self.values = tuple(values)
        self.names = tuple(value.name for value in self.values)
        self._columns = {column.name: column for column in columns}
        self.columns = tuple(self._columns)
        self.watches = dict(watches)
        self.needs_judge = needs_judge
        self._judge: Judge | None = None
        self._build = build
        self._refuse = refuse
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._torch_threads = torch_threads
        self._scorers: dict[str, Scorer] = {}
        self._fingerprint: str | None = None
        self._was_started = False
        used = [scorer for column in columns for scorer in column.scorers]
        self._health = {name: ScorerHealth() for name in dict.fromkeys(used)}
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="rewards-text")
        self._own_threads: dict[str, ThreadPoolExecutor] = {}
        cache = ScoreCache(cache_entries)
        self._batcher = Batcher(self._text_thread, cache, self._health)
        self._asking = Asking(cache, self._health)

    @property
    def fingerprint(self) -> str:
        """Return a sha256 over what the numbers depend on: configuration, models, measures.

        Two suites with one fingerprint give one matrix. Folders, descriptions and units do not
        count, nor does the device. Known once started.
        """
        if self._fingerprint is None:
            raise RewardError("the fingerprint is known once the suite is started; await start()")
        return self._fingerprint

    @property
    def text_only_names(self) -> tuple[str, ...]:
        """Return the values that any text has, whoever wrote it. Known once started."""
        if not self._scorers:
            raise RewardError("what values need is known once the suite is started; await start()")
        return tuple(
            name
            for name in self.names
            if not any(self._scorers[one].needs_logprobs for one in self._columns[name].scorers)
        )

    def use_judge(self, judge: Judge) -> None:
        """Let the chat model answer the questions of judged values; call it before ``start``."""
        if self._was_started:
            raise RewardError("the reward suite is started already; give it its judge before")
        self._judge = judge

    async def start(self) -> None:
        """Load and check the models.

        Raises
        ------
        RewardModelError
            When a model is missing, damaged, or not the one described.
        RewardConfigError
            When ``max_batch_tokens`` is less than a single input may take.
        RewardError
            When the device cannot be used, or the suite was started or closed before.
        """
        self._batcher.check_open()
        if self._was_started:
            raise RewardError("the reward suite is started already")
        self._was_started = True
        worker = self._batcher.worker
        worker.start()
        try:
            scorers, limits = await asyncio.wrap_future(worker.call(self._load))
        except BaseException:
            await self.close()
            raise
        worker.limits = limits
        self._fingerprint = hash_json(
            {"values": [self._columns[name].identity(scorers) for name in self.names]}
        )
        self._own_threads = {
            scorer.name: ThreadPoolExecutor(scorer.n_threads, f"rewards-{scorer.name}")
            for scorer in scorers.values()
            if isinstance(scorer, DirectScorer) and scorer.n_threads
        }
        self._scorers = scorers

    async def close(self) -> None:
        """Fail what is in flight and end the threads; a closed suite cannot be started again."""
        self._batcher.close()
        self._asking.close()
        # What is being prepared ends by itself, and then finds the batcher closed.
        for threads in (self._text_thread, *self._own_threads.values()):
            threads.shutdown(wait=False)
        await asyncio.to_thread(self._batcher.worker.join, _CLOSE_TIMEOUT_S)

    async def score(
        self, samples: Sequence[Sample], names: Collection[str] | None = None
    ) -> FloatArray:
        """Return the rewards of samples, shape (n_samples, n_columns).

        Parameters
        ----------
        samples : sequence of Sample
        names : collection of str or None
            Columns wanted, in the suite's order; None for all values. Others cost nothing.

        Raises
        ------
        ScoringError
            When a sample could not be scored; names the scorer and its values.
        RewardError
            On an unknown value, or when the suite is not running.
        """
        columns = self._wanted(names)
        if not self._scorers:
            raise RewardError("the reward suite is not started; await start() first")
        self._batcher.check_open()
        if not (samples and columns):
            return np.empty((len(samples), len(columns)))
        needed = [
            self._scorers[scorer]
            for scorer in dict.fromkeys(one for column in columns for one in column.scorers)
        ]
        apart = [
            asyncio.ensure_future(self._direct(list(samples), [scorer], threads))
            for scorer in needed
            if (threads := self._own_threads.get(scorer.name)) is not None
        ]
        others = [scorer for scorer in needed if scorer.name not in self._own_threads]
        judged = {
            scorer.name: asyncio.ensure_future(self._asking.score(scorer, samples))
            for scorer in needed
            if isinstance(scorer, JudgedScorer)
        }
        try:
            scores, work = await self._direct(list(samples), others, self._text_thread)
            batched = await self._batcher.score(work)
            scores.update(
                (piece.scorer.name, rows) for piece, rows in zip(work, batched, strict=True)
            )
            for found, _ in await asyncio.gather(*apart):
                scores.update(found)
            for name, task in judged.items():
                scores[name] = await task
        finally:
            running: list[asyncio.Future[Any]] = [*apart, *judged.values()]
            for future in running:
                future.cancel()
            await asyncio.gather(*running, return_exceptions=True)  # seen: no stray errors
        return np.column_stack([column.read(scores, self._scorers) for column in columns])

    def score_sync(
        self, samples: Sequence[Sample], names: Collection[str] | None = None
    ) -> FloatArray:
        """Return what `score` returns, outside of asyncio; inside ``with suite:``."""
        return asyncio.run(self.score(samples, names))

    def health(self) -> dict[str, dict[str, object]]:
        """Return, by scorer: state (ok, failing), last error, batches, texts, duplicates, ..."""
        return {name: health.report() for name, health in self._health.items()}

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    def __enter__(self) -> Self:
        """Start, outside of asyncio."""
        asyncio.run(self.start())
        return self

    def __exit__(self, *_: object) -> None:
        """Close, outside of asyncio."""
        asyncio.run(self.close())

    def _wanted(self, names: Collection[str] | None) -> list[Column]:
        if names is None:
            names = self.names
        for name in names:
            if name not in self._columns:
                raise RewardError(f"unknown value {name!r}; {suggest(name, self.columns)}")
        return [column for name, column in self._columns.items() if name in names]

    def _load(self) -> tuple[dict[str, Scorer], BatchLimits]:
        """Build and load the scorers, and settle the size of batches; on the device thread."""
        scorers = self._build()
        batched = [scorer for scorer in scorers if isinstance(scorer, BatchedScorer)]
        device, limits = "cpu", BatchLimits(0, 0)
        if batched:
            # Only now: it imports torch, which a suite without models does not need.
            from rewards.models import device as devices

            if self._torch_threads is not None:
                devices.set_threads(self._torch_threads)
            device = devices.resolve_device(self._device)
        for scorer in scorers:
            if isinstance(scorer, JudgedScorer):
                scorer.judge = self._judge
            scorer.load(device)
        if batched:
            limits = devices.default_limits(device)
            longest = max(batched, key=lambda scorer: scorer.max_length)
            max_tokens = self._max_batch_tokens or max(limits.max_tokens, longest.max_length)
            if max_tokens < longest.max_length:
                raise self._refuse(
                    ("scorers", longest.name, "max_length"),
                    f"inputs of up to {longest.max_length} tokens do not fit into batches of "
                    f"max_batch_tokens={max_tokens}; raise that, or lower this",
                )
            limits = dataclasses.replace(limits, max_tokens=max_tokens)
        return {scorer.name: scorer for scorer in scorers}, limits

    async def _direct(
        self, samples: list[Sample], scorers: list[Scorer], threads: ThreadPoolExecutor
    ) -> tuple[dict[str, FloatArray], list[Work]]:
        """Run `_prepare` off the event loop, and book its failure."""
        prepare = functools.partial(self._prepare, samples, scorers)
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, prepare)
        except ScoringError as error:
            # What one request lacks does not make the scorer fail for others.
            self._health[error.scorer].last_error = str(error)
            raise

    def _prepare(
        self, samples: list[Sample], scorers: list[Scorer]
    ) -> tuple[dict[str, FloatArray], list[Work]]:
        """Score directly what needs no model, and render the rest; on the text thread."""
        scores: dict[str, FloatArray] = {}
        work = []
        for scorer in scorers:
            try:
                if isinstance(scorer, DirectScorer):
                    given = scorer.score(samples)
                    scores[scorer.name] = as_rows(given, len(samples), len(scorer.outputs))
                    self._health[scorer.name].counted(len(samples))
                elif isinstance(scorer, BatchedScorer):
                    rendered = [scorer.render(sample) for sample in samples]
                    work.append(Work(scorer, [_key(item) for item in rendered], rendered))
            except ScoringError:
                raise
            except Exception as error:
                problem = f"the sample cannot be prepared: {type(error).__name__}: {error}"
                raise ScoringError(scorer.name, scorer.values, problem) from error
        return scores, work


def _key(rendered: object) -> bytes:
    """Return 16 bytes that are equal for equal renderings; the texts would fill the memory."""
    return hashlib.blake2b(repr(rendered).encode(), digest_size=16).digest()
