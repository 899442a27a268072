"""Samples N candidates for each held-out prompt and scores them, once for all methods; resumable.

One JSON line a prompt: rewards, tokens and words of every candidate, numbers only; texts where the
operator keeps them. The lines say nothing of palettes: other palettes are evaluated on the same
candidates without sampling again, and more prompts continue the same file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rewards import RewardSuite
from rewards.models.lexical import words
from server.backends.base import Backend, ContextLengthError, PromptError, SamplingSettings
from server.batch import continue_lines, seed_of
from server.calibrator import Progress
from server.prompts import Conversation
from server.scoring import answer_text, sample_of

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Collected:
    """The candidates of the prompts that could be answered, in the order of the file.

    Attributes
    ----------
    rewards : ndarray, shape (n_prompts, n_candidates, n_values)
    watched : ndarray, shape (n_prompts, n_candidates, n_watches)
        Columns that are reported and not optimised; see `RewardSuite.watches`.
    tokens, words : ndarray, shape (n_prompts, n_candidates)
        Lengths of the answers.
    texts : tuple of tuple of str, or None
        None where an earlier run sampled some of them and did not keep the texts.
    cluster : ndarray of int, shape (n_prompts,)
        Equal for prompts that are the same.
    seeds : tuple of int
        Of the draw, by prompt.
    n_refused : int
        Prompts that do not fit the model's template or context.
    n_incomplete : int
        Prompts that did not get all their candidates; a next run tries them again.
    """

    rewards: FloatArray
    watched: FloatArray
    tokens: FloatArray
    words: FloatArray
    texts: tuple[tuple[str, ...], ...] | None
    cluster: npt.NDArray[np.intp]
    seeds: tuple[int, ...]
    n_refused: int
    n_incomplete: int


def line_keys(
    prompts: Sequence[Conversation],
    backend: Backend,
    rewards: RewardSuite,
    sampling: SamplingSettings,
    n_candidates: int,
    seed: int,
) -> list[str]:
    """Return, by prompt, what its line depends on."""
    record = {
        "sampling": asdict(sampling),
        "seed": seed,
        "candidates": n_candidates,
        "model": backend.fingerprint,
        "rewards": rewards.fingerprint,
        "watches": rewards.watches,
    }
    common = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    keys = []
    for prompt in prompts:
        own = common.copy()
        own.update(json.dumps(prompt, sort_keys=True, ensure_ascii=False).encode())
        keys.append(own.hexdigest()[:16])
    return keys


async def collect(
    backend: Backend,
    rewards: RewardSuite,
    prompts: Sequence[Conversation],
    out: Path,
    *,
    limit: int | None,
    n_candidates: int,
    sampling: SamplingSettings,
    seed: int = 0,
    keep_texts: bool = False,
    concurrency: int = 4,
    progress: Progress = lambda done, total: None,
) -> Collected:
    """Return the candidates of the first `limit` prompts, sampling those that `out` has not yet.

    Candidates depend on their prompt, the settings and (seed, index) alone.

    Raises
    ------
    OutputError
        `out` holds something else, or candidates of other prompts or settings.
    BackendError, RewardError
        The first failure ends the run; what was written stays in the file.
    """
    keys = line_keys(prompts, backend, rewards, sampling, n_candidates, seed)
    lines: dict[int, Json] = {}

    def take(record: Any) -> bool:
        index = record["index"]
        if type(index) is not int or not 0 <= index < len(keys) or record["run"] != keys[index]:
            return False
        if "error" not in record:
            _check(record, rewards, n_candidates)
        lines[index] = record
        return True

    continue_lines(
        out,
        take,
        "`palette evaluate`",
        "candidates of other prompts, or of another number, seed, model, rewards or other settings",
    )
    wanted = range(len(prompts))[:limit]
    waiting = iter([index for index in wanted if index not in lines])
    done = sum(index in lines for index in wanted)
    texts: dict[int, list[str]] = {
        index: line["texts"] for index, line in lines.items() if "texts" in line
    }
    n_incomplete = 0
    progress(done, len(wanted))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab") as file:

        async def work() -> None:
            nonlocal done, n_incomplete
            for index in waiting:
                line: Json = {"index": index, "run": keys[index]}
                try:
                    found = await _candidates(
                        backend, rewards, prompts[index], n_candidates, sampling, seed, index
                    )
                except (PromptError, ContextLengthError) as error:
                    found = {"error": str(error)}
                if found is None:
                    n_incomplete += 1
                else:
                    if "texts" in found:
                        texts[index] = found["texts"]
                        if not keep_texts:
                            del found["texts"]
                    lines[index] = line | found
                    written = json.dumps(lines[index], ensure_ascii=False, allow_nan=False)
                    file.write(written.encode() + b"\n")
                    file.flush()
                done += 1
                progress(done, len(wanted))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(wanted))):
                    group.create_task(work())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            os.fsync(file.fileno())
    if n_incomplete:
        logger.warning(
            "%d of %d prompts did not get all their candidates and are left out; run the same "
            "command to try them again", n_incomplete, len(wanted),
        )  # fmt: skip
    usable = [index for index in wanted if index in lines and "error" not in lines[index]]
    return Collected(
        rewards=_stacked([lines[i]["rewards"] for i in usable], rewards.names, n_candidates),
        watched=_stacked(
            [lines[i]["watched"] for i in usable], rewards.watches.values(), n_candidates
        ),
        tokens=np.array([lines[i]["tokens"] for i in usable], dtype=np.float64),
        words=np.array([lines[i]["words"] for i in usable], dtype=np.float64),
        texts=(tuple(tuple(texts[i]) for i in usable) if all(i in texts for i in usable) else None),
        cluster=_clusters([prompts[i] for i in usable]),
        seeds=tuple(seed_of(seed, i) for i in usable),
        n_refused=sum("error" in lines[i] for i in wanted if i in lines),
        n_incomplete=n_incomplete,
    )


async def _candidates(
    backend: Backend,
    rewards: RewardSuite,
    messages: Conversation,
    n_candidates: int,
    sampling: SamplingSettings,
    seed: int,
    index: int,
) -> Json | None:
    """Return what is known of a prompt's candidates, or None when some did not come."""
    prompt = await backend.render(messages)
    stream = backend.generate(prompt, n_candidates, sampling, seed_of(seed, index))
    async with aclosing(stream):  # type: ignore[type-var]
        # Sorted: they arrive as they finish, the short ones first.
        drawn = sorted([one async for one in stream], key=lambda one: one.index)
    if len(drawn) < n_candidates:
        return None
    samples = [sample_of(prompt, one) for one in drawn]
    scored = await rewards.score(samples)
    watched = {
        column: (await rewards.score(samples, [column]))[:, 0].tolist()
        for column in dict.fromkeys(rewards.watches.values())
    }
    answers = [answer_text(one) for one in drawn]
    return {
        "rewards": dict(zip(rewards.names, scored.T.tolist(), strict=True)),
        "watched": watched,
        "tokens": [one.n_tokens for one in drawn],
        "words": [len(words(answer)) for answer in answers],
        "texts": answers,
    }


def _check(record: Json, rewards: RewardSuite, n_candidates: int) -> None:
    """Raise ValueError or KeyError for a line that cannot be one of this command's."""
    scored, watched = record["rewards"], record["watched"]
    columns = [scored[name] for name in rewards.names]
    columns += [watched[name] for name in rewards.watches.values()]
    columns += [record["tokens"], record["words"]]
    array = np.array(columns, dtype=np.float64)
    if array.shape != (len(columns), n_candidates) or not np.isfinite(array).all():
        raise ValueError("not the numbers of every candidate")


def _stacked(records: Sequence[Json], names: Sequence[str] | Any, n_candidates: int) -> FloatArray:
    columns = list(names)
    table = [[record[name] for name in columns] for record in records]
    array = np.array(table, dtype=np.float64).reshape(len(records), len(columns), n_candidates)
    return np.ascontiguousarray(array.transpose(0, 2, 1))


def _clusters(prompts: Sequence[Conversation]) -> npt.NDArray[np.intp]:
    """Return numbers that are equal for equal prompts, shape (n_prompts,)."""
    numbers: dict[str, int] = {}
    told = (json.dumps(prompt, sort_keys=True) for prompt in prompts)
    return np.array([numbers.setdefault(text, len(numbers)) for text in told], dtype=np.intp)
