"""All rewards of a server: samples in, a matrix of numbers out."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from rewards.base import (
    BatchedScorer,
    FloatArray,
    Judge,
    JudgedScorer,
    Sample,
    Scorer,
    Value,
)
from rewards.batch import BatchLimits
from rewards.columns import Column
from rewards.config import TransformConfig
from rewards.config_file import FieldPath, suggest
from rewards.errors import RewardConfigError, RewardError
from rewards.hub import cache_where_no_hub
from rewards.identity import hash_json
from rewards.judging import Asked, Judging
from rewards.pairs import Pair, find_problem, samples_of, unscorable
from rewards.running import Runner

_CLOSE_TIMEOUT_S = 10.0

# 32 requests of 64 candidates of 2048 tokens each, as many as a server takes by default.
QUEUE_TOKENS = 2**22
# A pass takes milliseconds to seconds; on a slow CPU, with a large model, perhaps ten.
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """Rewards, some of which may be missing.

    Attributes
    ----------
    rewards : ndarray, shape (n_samples, n_columns)
        NaN in the columns that failed.
    failures : dict of str to str
        Column -> why it failed.
    asked : Asked
        What the chat model was asked for it.
    """

    rewards: FloatArray
    failures: dict[str, str]
    asked: Asked = field(default_factory=Asked)


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
        All that can be scored: the names, then what is only watched, then lengths where a
        transform reads them.
    watches : dict of str to str
        Value -> the column of its held-out scorer, which nobody optimises.
    transforms : dict of str to TransformConfig
        Of the values that have one: what becomes of their numbers before they are aligned. What
        `score` returns is as measured; see `rewards.transforms`.
    needs_judge : bool
        Whether some are judged by the chat model, so that ``use_judge`` must come before ``start``.
    """

    def __init__(
        self,
        *,
        values: Sequence[Value],
        columns: Sequence[Column],
        watches: Mapping[str, str],
        transforms: Mapping[str, TransformConfig],
        pairs: Mapping[str, Sequence[Pair]] | None = None,
        build: Callable[[], list[Scorer]],
        refuse: Callable[[FieldPath, str], RewardConfigError],
        device: str,
        max_batch_tokens: int | None,
        cache_entries: int,
        torch_threads: int | None,
        queue_tokens: int = QUEUE_TOKENS,
        timeout_s: float = TIMEOUT_S,
        needs_hub: bool = False,
        needs_judge: bool = False,
    ) -> None:
        self.values = tuple(values)
        self.names = tuple(value.name for value in self.values)
        self._columns = {column.name: column for column in columns}
        self.columns = tuple(self._columns)
        self.watches = dict(watches)
        self.transforms = dict(transforms)
        self._pairs = dict(pairs or {})
        self._needs_hub = needs_hub
        self.needs_judge = needs_judge
        self._judge: Judge | None = None
        self._build = build
        self._refuse = refuse
        self._device = device
        self._max_batch_tokens = max_batch_tokens
        self._torch_threads = torch_threads
        self._scorers: dict[str, Scorer] = {}
        self._built: list[Scorer] = []
        self._fingerprint: str | None = None
        self._was_started = False
        used = [scorer for column in columns for scorer in column.scorers]
        self._runner = Runner(
            used, cache_entries=cache_entries, queue_tokens=queue_tokens, timeout_s=timeout_s
        )

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

    @property
    def text_only_columns(self) -> tuple[str, ...]:
        """Return the columns that any text has, as `text_only_names`. Known once started."""
        names = set(self.text_only_names)
        return tuple(
            name
            for name, column in self._columns.items()
            if name in names or not any(self._scorers[one].needs_logprobs for one in column.scorers)
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
            When ``max_batch_tokens`` is less than a single input may take, or a value does not
            tell a better from a worse answer of the file.
        RewardError
            When the device cannot be used, or the suite was started or closed before.
        """
        self._runner.batcher.check_open()
        if self._was_started:
            raise RewardError("the reward suite is started already")
        self._was_started = True
        worker = self._runner.batcher.worker
        worker.start()
        try:
            scorers, limits = await asyncio.wrap_future(worker.call(self._load))
        except BaseException:
            await self.close()
            raise
        worker.budgets.settle(limits)
        self._fingerprint = hash_json(
            {"values": [self._columns[name].identity(scorers) for name in self.names]}
        )
        self._runner.use(scorers)
        self._scorers = scorers
        try:
            await self._check_pairs()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Fail what is in flight and end the threads; a closed suite cannot be started again."""
        self._runner.close()
        await asyncio.to_thread(self._runner.batcher.worker.join, _CLOSE_TIMEOUT_S)
        for scorer in self._built:
            await asyncio.to_thread(scorer.close)

    async def score(
        self,
        samples: Sequence[Sample],
        names: Collection[str] | None = None,
        *,
        more: bool = False,
    ) -> FloatArray:
        """Return the rewards of samples, shape (n_samples, n_columns).

        Parameters
        ----------
        samples : sequence of Sample
        names : collection of str or None
            Columns wanted, in the suite's order; None for all values. Others cost nothing.
        more : bool
            More samples of the same answer come soon: on a GPU these may wait for them, a little.

        Raises
        ------
        ScoringError
            When a sample could not be scored; names the scorer and its values.
        RewardQueueFullError
            When too many texts wait already.
        RewardError
            On an unknown value, or when the suite is not running.
        """
        return (await self.attempt(samples, (), names, more=more)).rewards

    async def attempt(
        self,
        samples: Sequence[Sample],
        may_fail: Collection[str],
        names: Collection[str] | None = None,
        *,
        more: bool = False,
    ) -> Attempt:
        """Return the rewards of samples, and why some are missing.

        Parameters
        ----------
        may_fail : collection of str
            Columns whose failure is returned instead of raised.
        samples, names, more
            As of `score`, as is what is raised.
        """
        columns = self._wanted(names)
        if not self._scorers:
            raise RewardError("the reward suite is not started; await start() first")
        self._runner.batcher.check_open()
        if not (samples and columns):
            return Attempt(np.empty((len(samples), len(columns))), {})
        needed = dict.fromkeys(one for column in columns for one in column.scorers)
        required = {
            one for column in columns if column.name not in may_fail for one in column.scorers
        }
        outcome = await self._runner.run(
            samples, needed, may_fail=needed.keys() - required, more=more
        )
        rewards, failures = [], {}
        for column in columns:
            lost = [one for one in column.scorers if one in outcome.failures]
            if lost:
                failures[column.name] = str(outcome.failures[lost[0]])
                rewards.append(np.full(len(samples), np.nan))
            else:
                rewards.append(column.read(outcome.scores, self._scorers))
        return Attempt(np.column_stack(rewards), failures, outcome.asked)

    def score_sync(
        self, samples: Sequence[Sample], names: Collection[str] | None = None
    ) -> FloatArray:
        """Return what `score` returns, outside of asyncio; inside ``with suite:``."""
        return asyncio.run(self.score(samples, names))

    def health(self) -> dict[str, dict[str, object]]:
        """Return, by scorer: state (ok, failing, hung), last error, batches, texts, ..."""
        return self._runner.health()

    def judging(self) -> dict[str, Judging]:
        """Return what the chat model was asked, by scorer that has asked something."""
        return self._runner.judging()

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

    def _load(self) -> tuple[dict[str, Scorer], dict[BatchedScorer, BatchLimits]]:
        """Build and load the scorers, and settle the size of batches; on the device thread."""
        scorers = self._built = self._build()
        batched = [scorer for scorer in scorers if isinstance(scorer, BatchedScorer)]
        device = "cpu"
        if batched:
            # Only now: it imports torch, which a suite without models does not need.
            from rewards.models import device as devices

            if self._torch_threads is not None:
                devices.set_threads(self._torch_threads)
            device = devices.resolve_device(self._device)
        with cache_where_no_hub(is_needed=self._needs_hub):
            for scorer in scorers:
                if isinstance(scorer, JudgedScorer):
                    scorer.judge = self._judge
                scorer.load(device)
        return {scorer.name: scorer for scorer in scorers}, {
            scorer: self._limits(scorer, device) for scorer in batched
        }

    async def _check_pairs(self) -> None:
        """Refuse values that do not tell better from worse answers."""
        for name, pairs in self._pairs.items():
            column = self._columns[name]
            problem = unscorable(column, self._scorers)
            if problem is None:
                scores = (await self.score(samples_of(pairs), [name]))[:, 0]
                look = functools.partial(find_problem, column, self._scorers, pairs, scores)
                problem = await asyncio.wrap_future(self._runner.batcher.worker.call(look))
            if problem is not None:
                raise self._refuse(("values", name, "check"), problem)

    def _limits(self, scorer: BatchedScorer, device: str) -> BatchLimits:
        from rewards.models import budgets

        if self._max_batch_tokens is None:
            return budgets.find_limits(scorer, device)
        if self._max_batch_tokens < scorer.max_length:
            raise self._refuse(
                ("scorers", scorer.name.split("+")[0], "max_length"),
                f"inputs of up to {scorer.max_length} tokens do not fit into batches of "
                f"max_batch_tokens={self._max_batch_tokens}; raise that, or lower this",
            )
        limits = budgets.default_limits(device)
        return dataclasses.replace(limits, max_tokens=self._max_batch_tokens)
