"""The candidates of one request, fetched from an OpenAI-compatible server.

Several are asked for at once where it can be; what is missing afterwards is asked for again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.backends.base import Candidate, PromptError, UpstreamError
from server.backends.openai_replies import Answers
from server.backends.openai_transport import TransientError, Upstream
from server.backends.openai_wire import STREAMED

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """So many candidates of a request will not come, and why."""

    n: int
    error: Exception


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One call of `generate`.

    Attributes
    ----------
    fields : dict
        The request without seed, n and stream.
    seed : int or None
        Of candidate 0; candidate i has i more, as the answers of one request have in vLLM. None
        where the upstream takes none.
    is_streamed : bool
        Whether requests for several candidates take each as it finishes.
    arrivals : asyncio.Queue
    """

    fields: dict[str, Any]
    seed: int | None
    is_streamed: bool
    arrivals: asyncio.Queue[Candidate | Failure]


class Fetcher:
    """Fetches candidates.

    Parameters
    ----------
    upstream : Upstream
    n_per_request : int
        Candidates asked for in one request; becomes less when the upstream refuses so many.
    """

    def __init__(self, upstream: Upstream, n_per_request: int) -> None:
        self.n_per_request = n_per_request
        self._upstream = upstream

    async def fetch(self, job: Job, n_candidates: int) -> None:
        """Put so many candidates into the job's queue; for those that do not come, why."""
        await self._fetch_groups(job, range(n_candidates), self.n_per_request)

    async def _fetch_groups(self, job: Job, indices: Sequence[int], size: int) -> None:
        groups = (list(indices[at : at + size]) for at in range(0, len(indices), size))
        await asyncio.gather(*(self._fetch_group(job, group) for group in groups))

    async def _fetch_group(self, job: Job, missing: list[int]) -> None:
        try:
            try:
                await self._collect(job, missing)
            except PromptError:
                if len(missing) < 2:
                    raise
                # Is it the request that is refused, or so many answers to it?
                first = missing[:1]
                await self._collect(job, first)
                del missing[0]
                size = (len(missing) + 1) // 2
                if size < self.n_per_request:
                    self.n_per_request = size
                    logger.warning("upstream refuses so many answers a request: now %d", size)
                rest, missing[:] = list(missing), []
                await self._fetch_groups(job, rest, size)
        except Exception as error:  # noqa: BLE001  # whatever it was, somebody waits for it
            job.arrivals.put_nowait(Failure(len(missing), error))

    async def _collect(self, job: Job, missing: list[int]) -> None:
        """Take candidates off `missing` as they come, asking again for those that do not.

        Raises
        ------
        BackendError
        """

        def deliver(candidate: Candidate) -> None:
            missing.remove(candidate.index)
            job.arrivals.put_nowait(candidate)

        async def attempt() -> None:
            n_wanted = len(missing)
            for run in _runs(missing):
                answers = Answers(run, has_logprobs="logprobs" in job.fields, deliver=deliver)
                await self._upstream.chat(_body(job, run), answers.take)
                answers.end()
                for index, error in answers.failures.items():
                    missing.remove(index)
                    job.arrivals.put_nowait(Failure(1, error))
            if missing:
                msg = f"the upstream model server left out {len(missing)} of {n_wanted} answers"
                raise TransientError(UpstreamError(msg))

        await self._upstream.retrying(attempt)


def _body(job: Job, run: Sequence[int]) -> dict[str, Any]:
    body = dict(job.fields)
    if job.seed is not None:
        body["seed"] = job.seed + run[0]
    if len(run) > 1:
        body["n"] = len(run)
        if job.is_streamed:
            body |= STREAMED
    return body


def _runs(indices: Sequence[int]) -> list[list[int]]:
    """Return the indices in runs without gaps: one request gives seeds s, s + 1, ..."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] + 1 == index:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs
