"""Makes a calibration: K candidates of the base model for each of P prompts, scored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime

import numpy as np

from rewards import RewardSuite
from server.backends.base import (
    Backend,
    Candidate,
    ContextLengthError,
    PromptError,
    SamplingSettings,
)
from server.calibration import Calibration, CalibrationError, CalibrationInfo
from server.prompts import Conversation
from server.scoring import sample_of
from server.version import VERSION
from solver import PilotSet

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

# With fewer, the standard error of a level is above a quarter of the spread between prompts.
FEWEST_PROMPTS = 16


async def calibrate(
    backend: Backend,
    rewards: RewardSuite,
    prompts: Sequence[Conversation],
    *,
    n_candidates: int,
    sampling: SamplingSettings,
    seed: int = 0,
    prompts_source: str,
    concurrency: int = 4,
    progress: Progress = lambda done, total: None,
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
    concurrency : int
        Prompts in flight at once.
    progress : callable
        Gets (prompts done, prompts in all).

    Raises
    ------
    CalibrationError
        When fewer than 16 prompts are usable.
    BackendError, RewardError
        When generation or scoring fails.
    """
    results: dict[int, tuple[np.ndarray, list[Candidate]]] = {}
    seeds = np.random.SeedSequence(seed).generate_state(len(prompts), dtype=np.uint64) >> 1
    waiting = iter(enumerate(prompts))
    reads_logprobs = set(rewards.text_only_names) != set(rewards.names)
    done = refused = incomplete = 0

    async def work() -> None:
        nonlocal done, refused, incomplete
        for index, messages in waiting:
            try:
                prompt = await backend.render(messages)
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
                    scored = await rewards.score([sample_of(prompt, one) for one in drawn])
                    results[index] = (scored, drawn)
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
        msg = (
            f"only {len(results)} of {len(prompts)} prompts are usable; a calibration needs at "
            f"least {FEWEST_PROMPTS}, and 300 or more to be precise: give more prompts"
        )
        raise CalibrationError(msg)
    ordered = [results[index] for index in sorted(results)]
    candidates = [one for _, drawn in ordered for one in drawn]
    info = CalibrationInfo(
        model=backend.model_id,
        model_fingerprint=backend.fingerprint,
        rewards_fingerprint=rewards.fingerprint,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        longest_answer_tokens=max(one.n_tokens for one in candidates),
        truncated_share=sum(one.finish_reason == "length" for one in candidates) / len(candidates),
        prompts_source=prompts_source,
        seed=seed,
        created=datetime.now(UTC),
        palette_version=VERSION,
    )
    # Half precision would be enough for statistics; single keeps what the models computed.
    stacked = np.stack([scored for scored, _ in ordered]).astype(np.float32)
    return Calibration(PilotSet(stacked, rewards.names), info)
