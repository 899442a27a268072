"""The one thread that owns the device: loads models, runs batches, tells what became of them.

The thread takes its next batch itself, at the moment the device is free. So there is no timer, no
batch is formed earlier than needed, and everything that arrived during a forward pass shares the
next one, from whichever requests it came.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

from rewards.base import FloatArray, as_rows
from rewards.batch import BatchLimits, Entry, EntryQueue, Waiter

Result = TypeVar("Result")

BatchCallback = Callable[[list[Entry[Waiter]], "FloatArray | Exception"], None]


class Worker(Generic[Waiter]):
    """A thread with a queue of entries and a list of calls; calls go before batches.

    Parameters
    ----------
    on_batch : callable
        Called on this thread with a batch and either its scores, shape (n_entries, n_outputs), or
        the exception that the forward pass raised. Must not raise.
    """

    def __init__(self, on_batch: BatchCallback[Waiter]) -> None:
        self.limits = BatchLimits(0, 0)  # set before an entry is queued, once the device is known
        self._on_batch = on_batch
        self._queue: EntryQueue[Waiter] = EntryQueue()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        # A daemon: a server that is told to stop must not wait for a hung device.
        self._thread = threading.Thread(target=self._run, name="rewards-device", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Run a function on this thread before the next batch; return its future result."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - it is raised again where it is awaited
                future.set_exception(error)

        with self._wake:
            self._calls.append(run)
            self._wake.notify()
        return future

    def add(self, entries: Iterable[Entry[Waiter]]) -> None:
        """Queue encoded entries."""
        with self._wake:
            self._queue.add(entries)
            self._wake.notify()

    def discard(self, entries: Iterable[Entry[Waiter]]) -> None:
        """Drop queued entries; those in the running batch run to its end."""
        with self._wake:
            self._queue.discard(entries)

    @property
    def n_queued(self) -> int:
        """Entries that wait for the device, those of the running batch not counted."""
        with self._wake:
            return len(self._queue)

    def close(self) -> None:
        """End the thread after the running batch; what is queued is not scored."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended, at most ``timeout_s`` seconds."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._is_closing or self._calls or len(self._queue)):
                    self._wake.wait()
                if self._is_closing:
                    return
                call = self._calls.popleft() if self._calls else None
                batch = [] if call else self._queue.take(self.limits)
            if call is not None:
                call()
                continue
            self._on_batch(batch, self._forward(batch))

    def _forward(self, batch: list[Entry[Waiter]]) -> FloatArray | Exception:
        try:
            tokens = [entry.tokens for entry in batch if entry.tokens is not None]
            scorer = batch[0].scorer
            return as_rows(scorer.forward(tokens), len(batch), len(scorer.outputs))
        except Exception as error:  # noqa: BLE001 - any failure belongs to this batch; the loop goes on
            return error
