"""The one thread that owns torch: which request decodes its next token when.

Every request in progress gets one step in turn, so a short one is not stuck behind a long one.
Requests wait first come, first served, while `max_rows` answers are in progress.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.backends.base import (
    BackendError,
    BackendUnavailableError,
    Candidate,
    ModelLoadError,
    Prompt,
    SamplingSettings,
)

if TYPE_CHECKING:
    # torch is imported by the thread, so that importing this module, or the server, costs nothing.
    from server.backends.hf_asking import Inquiry, Reader
    from server.backends.hf_decoding import Batch, Prefix
    from server.backends.hf_loading import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Job:
    """One request, and how its answers reach who asked.

    Attributes
    ----------
    deliver : callable
        Called in the worker thread with every candidate, or once with what went wrong.
    is_cancelled : bool
        Set from any thread; seen before the next step.
    """

    prompt: Prompt
    n_candidates: int
    sampling: SamplingSettings
    seed: int
    top_logprobs: int
    deliver: Callable[[Candidate | BackendError], None]
    is_cancelled: bool = False
    n_admitted: int = 0
    prefix: Prefix | None = field(default=None, repr=False)


@dataclass(slots=True, eq=False)
class _Slice:
    """Candidates of one job that decode together; the batch exists from the first step on."""

    job: Job
    indices: range
    batch: Batch | None = None

    @property
    def n_rows(self) -> int:
        return len(self.indices) if self.batch is None else len(self.batch)


class Worker:
    """Loads a model in a thread of its own and decodes with it until closed.

    Parameters
    ----------
    load : callable
        Returns the model; run in the thread.
    max_rows : int
        Answers in progress at most, over all requests.
    on_loaded : callable
        Called in the thread with the model, or with why there is none.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        max_rows: int,
        on_loaded: Callable[[LoadedModel | ModelLoadError], None],
    ) -> None:
        self._load = load
        self._max_rows = max_rows
        self._on_loaded = on_loaded
        self._changed = threading.Condition()
        self._arrived: deque[Job] = deque()
        self._inquiries: deque[Inquiry] = deque()
        self._is_closing = False
        self._probe_wanted = False
        # Written by the worker thread alone, read by `health`.
        self._waiting: deque[Job] = deque()
        self._running: list[_Slice] = []
        self._last_error: str | None = None
        self._is_failing = False
        self._has_ended = False
        self.decode_steps = 0
        # A daemon: a process that forgets to close must still be able to end.
        self._thread = threading.Thread(target=self._run, name="palette-hf-local", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises
        ------
        BackendUnavailableError
        """
        with self._changed:
            if self._is_closing or self._has_ended:
                raise BackendUnavailableError("the model is not running; retry later")
            self._arrived.append(job)
            self._changed.notify()

    def ask(self, inquiry: Inquiry) -> None:
        """Queue an inquiry, which takes no row: one is answered between any two steps.

        Raises
        ------
        BackendUnavailableError
        """
        with self._changed:
            if self._is_closing or self._has_ended:
                raise BackendUnavailableError("the model is not running; retry later")
            self._inquiries.append(inquiry)
            self._changed.notify()

    def cancel(self, job: Job | Inquiry) -> None:
        """Drop a job before its next step; nothing is delivered after that."""
        job.is_cancelled = True
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the step in progress; every job gets `BackendUnavailableError`."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def health(self) -> dict[str, object]:
        """Return the state and what is in progress; a failing worker tries itself again."""
        running = list(self._running)
        if self._is_failing:
            with self._changed:
                self._probe_wanted = True
                self._changed.notify()
        stopped = self._is_closing or self._has_ended
        return {
            "state": "stopped" if stopped else "failing" if self._is_failing else "ok",
            "active_jobs": len({id(part.job) for part in running}),
            "active_rows": sum(part.n_rows for part in running),
            "waiting": len(self._waiting) + len(self._arrived),
            "decode_steps": self.decode_steps,
            "last_error": self._last_error,
        }

    def _run(self) -> None:
        try:
            loaded = self._load()
        except ModelLoadError as error:
            self._has_ended = True
            self._on_loaded(error)
            return
        except Exception as error:
            logger.exception("loading the model failed unexpectedly")
            self._has_ended = True
            self._on_loaded(ModelLoadError(f"loading failed: {type(error).__name__}: {error}"))
            return
        self._on_loaded(loaded)
        try:
            self._serve(loaded)
        finally:
            self._end()

    def _serve(self, loaded: LoadedModel) -> None:
        import torch

        from server.backends.hf_asking import Reader

        reader = Reader(loaded.model, loaded.device)
        with torch.inference_mode():
            while self._take():
                self._admit()
                for part in list(self._running):
                    if part.job.is_cancelled:
                        self._running.remove(part)
                    else:
                        self._step(part, loaded)
                self._answer(reader)
                if self._is_failing and self._probe_wanted:
                    self._probe(loaded)

    def _take(self) -> bool:
        """Take in what has arrived, waiting while there is nothing to do; False when closing."""
        with self._changed:
            while not (
                self._is_closing
                or self._arrived
                or self._inquiries
                or self._running
                or self._waiting
                or self._probe_wanted
            ):
                self._changed.wait()
            self._waiting.extend(self._arrived)
            self._arrived.clear()
            return not self._is_closing

    def _admit(self) -> None:
        """Move waiting candidates into the free rows, first come, first served."""
        free = self._max_rows - sum(part.n_rows for part in self._running)
        while self._waiting:
            job = self._waiting[0]
            size = min(job.n_candidates - job.n_admitted, self._max_rows)
            if job.is_cancelled:
                self._waiting.popleft()
            elif size > free:
                return
            else:
                part = _Slice(job, range(job.n_admitted, job.n_admitted + size))
                job.n_admitted += size
                free -= size
                self._running.append(part)
                if job.n_admitted == job.n_candidates:
                    self._waiting.popleft()

    def _step(self, part: _Slice, loaded: LoadedModel) -> None:
        """Give one step to a slice; a failure is its job's alone."""
        job = part.job
        try:
            if part.batch is None:
                part.batch = self._start(part, loaded)
            finished = part.batch.step()
            self.decode_steps += 1
        except Exception as error:
            # Whatever a model's code raises, out of memory included.
            logger.exception("a decoding step failed")
            # Out of the list first, here and below: who has heard of a job's end must not find it
            # in progress.
            self._running = [other for other in self._running if other.job is not job]
            self._fail(job, error)
            return
        self._is_failing = False
        if not part.n_rows:
            self._running.remove(part)
        for candidate in finished:
            job.deliver(candidate)

    def _answer(self, reader: Reader) -> None:
        """Answer one inquiry: of the prompt that was read last, or the oldest."""
        with self._changed:
            same = (one for one in self._inquiries if one.head == reader.head)
            inquiry = next(same, self._inquiries[0] if self._inquiries else None)
            if inquiry is not None:
                self._inquiries.remove(inquiry)
        if inquiry is not None and not inquiry.is_cancelled:
            try:
                found = reader.answer(inquiry)
            except Exception as error:
                logger.exception("answering a question failed")
                reader.forget()
                self._fail(inquiry, error)
            else:
                self._is_failing = False
                inquiry.deliver(found)
        if not (self._inquiries or self._running or self._waiting):
            reader.forget()

    def _start(self, part: _Slice, loaded: LoadedModel) -> Batch:
        from server.backends.hf_decoding import Batch, copy_prefix, read_prompt

        job = part.job
        prefix = job.prefix
        if prefix is None:
            prefix = read_prompt(loaded.model, job.prompt.token_ids, loaded.device)
        if part.indices.stop < job.n_candidates:
            # Other slices of the job follow and read the same prompt.
            job.prefix = prefix
            prefix = copy_prefix(prefix)
        else:
            job.prefix = None
        return Batch(
            loaded.model,
            loaded.detokenizer,
            loaded.eos_ids,
            prefix,
            part.indices,
            job.sampling,
            job.seed,
            job.top_logprobs,
            job.prompt.token_ids,
        )

    def _fail(self, job: Job | Inquiry, error: Exception) -> None:
        import torch

        self._last_error = f"{type(error).__name__}: {error}"
        self._is_failing = True
        job.is_cancelled = True
        if isinstance(job, Job):
            job.prefix = None
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            advice = "; fewer candidates, shorter answers or a smaller max_rows need less memory"
        else:
            advice = ""
        failure = BackendError(f"generation failed: {self._last_error}{advice}")
        failure.__cause__ = error
        job.deliver(failure)

    def _probe(self, loaded: LoadedModel) -> None:
        """Read one token, so that a worker without requests learns that it works again."""
        from server.backends.hf_decoding import read_prompt

        self._probe_wanted = False
        try:
            read_prompt(loaded.model, [min(loaded.eos_ids)], loaded.device)
        except Exception as error:
            logger.exception("the model still fails")
            self._last_error = f"{type(error).__name__}: {error}"
        else:
            self._is_failing = False

    def _end(self) -> None:
        with self._changed:
            self._has_ended = True
            jobs = [part.job for part in self._running]
            jobs += [job for job in (*self._waiting, *self._arrived) if job not in jobs]
            inquiries = list(self._inquiries)
            self._inquiries.clear()
            self._waiting.clear()
            self._arrived.clear()
            self._running = []
        unanswered: list[Job | Inquiry] = [*dict.fromkeys(jobs), *inquiries]
        for waiting in unanswered:
            if not waiting.is_cancelled:
                waiting.deliver(BackendUnavailableError("the model was stopped; retry later"))
