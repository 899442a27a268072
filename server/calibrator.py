"""Makes a calibration: K candidates of the base model for each of P prompts, scored."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime

import numpy as np

from rewards import RewardSuite
from server.backends.base import (
    Backend,
    ContextLengthError,
    PromptError,
    SamplingSettings,
)
from server.calibration import Calibration, CalibrationError, CalibrationInfo, system_of
from server.journal import Answers, Journal
from server.prompts import Conversation, hash_of
from server.scoring import sample_of
from server.version import VERSION
from solver import PilotSet

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

# With fewer, the standard error of a level is above a quarter of the spread between prompts.
FEWEST_PROMPTS = 16


def _too_few(n_usable: int, n_prompts: int) -> str:
    return (
        f"only {n_usable} of {n_prompts} prompts are usable; a calibration needs at least "
        f"{FEWEST_PROMPTS}, and 300 or more to be precise: give more prompts"
    )


async def calibrate(
    backend: Backend,
    rewards: RewardSuite,
    prompts: Sequence[Conversation],
    *,
    n_candidates: int,
    sampling: SamplingSettings,
    seed: int = 0,
    prompts_source: str,
    name: str | None = None,
    concurrency: int = 4,
    progress: Progress = lambda done, total: None,
    journal: Journal | None = None,
) -> Calibration:
    """Return a calibration made by sampling and scoring.

    Prompts that the model's template or context refuses are left out and counted in the log.

    Parameters
    ----------
    backend : Backend
        Started.
    rewards : RewardSuite
        Started.
    prompts : sequence of conversations
    n_candidates : int
        K: the largest N that palettes can be promised for.
    sampling : SamplingSettings
        Part of the base distribution; without stop strings.
    seed : int
    prompts_source : str
        Where the prompts come from, for the record.
    name : str, optional
        By which requests can ask for it.
    concurrency : int
        Prompts in flight at once.
    progress : callable
        Gets (prompts done, prompts in all).
    journal : Journal, optional
        Has the prompts that are done already, and gets the others.

    Raises
    ------
    CalibrationError
        When fewer than 16 prompts are usable.
    BackendError, RewardError
        When generation or scoring fails.
    """
    if len(prompts) < FEWEST_PROMPTS:
        raise CalibrationError(_too_few(len(prompts), len(prompts)))
    results = {} if journal is None else dict(journal.done)
    seeds = np.random.SeedSequence(seed).generate_state(len(prompts), dtype=np.uint64) >> 1
    waiting = iter([index for index in range(len(prompts)) if index not in results])
    done, refused, incomplete = len(results), 0, 0
    if done:
        progress(done, len(prompts))
    reads_logprobs = set(rewards.text_only_columns) != set(rewards.columns)

    async def work() -> None:
        nonlocal done, refused, incomplete
        for index in waiting:
            try:
                prompt = await backend.render(prompts[index])
                stream = backend.generate(
                    prompt,
                    n_candidates,
                    sampling,
                    int(seeds[index]),
                    wants_logprobs=reads_logprobs,
                )
                async with aclosing(stream):  # type: ignore[type-var]
                    # Sorted: they arrive as they finish, the short ones first.
                    drawn = sorted([one async for one in stream], key=lambda one: one.index)
            except (PromptError, ContextLengthError):
                refused += 1  # by the chat template, or by the server that has it
            else:
                if len(drawn) == n_candidates:
                    scored = await rewards.score(
                        [sample_of(prompt, one) for one in drawn], rewards.columns
                    )
                    results[index] = Answers(
                        # Half precision would be enough for statistics; single keeps what the
                        # models computed.
                        scored.astype(np.float32),
                        longest=max(one.n_tokens for one in drawn),
                        n_cut=sum(one.finish_reason == "length" for one in drawn),
                    )
                    if journal is not None:
                        journal.append(index, results[index])
                else:
                    incomplete += 1
            done += 1
            progress(done, len(prompts))

    # The iterator is shared: each worker takes the next prompt when it is free.
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(prompts))):
                group.create_task(work())
    except ExceptionGroup as failures:
        # One failure cancels the rest, so there is one to tell.
        raise failures.exceptions[0] from None

    if incomplete:
        logger.warning(
            "%d of %d prompts did not get all their candidates; left out", incomplete, len(prompts)
        )
    if refused:
        logger.warning("%d of %d prompts do not fit this model; left out", refused, len(prompts))
    if len(results) < FEWEST_PROMPTS:
        raise CalibrationError(_too_few(len(results), len(prompts)))
    used = sorted(results)
    info = CalibrationInfo(
        model=backend.model_id,
        model_fingerprint=backend.fingerprint,
        rewards_fingerprint=rewards.fingerprint,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        longest_answer_tokens=max(results[index].longest for index in used),
        truncated_share=sum(results[index].n_cut for index in used) / (len(used) * n_candidates),
        prompts_source=prompts_source,
        seed=seed,
        created=datetime.now(UTC),
        palette_version=VERSION,
        name=name,
        revision=backend.revision,
        chat_template=backend.chat_template,
        systems=dict(Counter(system_of(prompts[index]) for index in used)),
        prompts_hash=hash_of(prompts),
        n_given=len(prompts),
    )
    stacked = np.stack([results[index].rewards for index in used])
    return Calibration(PilotSet(stacked, rewards.columns), info)
