"""The thread that owns the device: loads models, runs batches, tells what became of them.

The thread takes its next batch itself, at the moment the device is free. So no batch is formed
earlier than needed, and everything that arrived during a forward pass shares the next one, from
whichever requests it came. There is no timer, but for inputs that say that more of their kind will
come soon and can wait for it: see `Worker.add`.

A forward pass that does not end is given up: the thread is left to it, another one takes over, and
its scorer is served again once the pass has ended.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from rewards.base import BatchedScorer, FloatArray, as_rows
from rewards.batch import Entry, EntryQueue, Waiter
from rewards.budget import Budgets, is_out_of_memory
from rewards.errors import HungError

Result = TypeVar("Result")

BatchCallback = Callable[[list[Entry[Waiter]], "FloatArray | Exception"], None]


@dataclass(slots=True, eq=False)
class _Pass(Generic[Waiter]):
    """A forward pass on the device."""

    batch: list[Entry[Waiter]]
    started: float


class Worker(Generic[Waiter]):
    """A thread with a queue of entries and a list of calls; calls go before batches.

    Parameters
    ----------
    on_batch : callable
        Called off the event loop with a batch and either its scores, shape (n_entries, n_outputs),
        or the exception that the forward pass raised. Must not raise.
    timeout_s : float
        Longest forward pass.

    Attributes
    ----------
    budgets : Budgets
        Settled before an entry is queued, once the device is known.
    """

    def __init__(self, on_batch: BatchCallback[Waiter], timeout_s: float = math.inf) -> None:
        self.budgets = Budgets()
        self._on_batch = on_batch
        self._timeout_s = timeout_s
        self._queue: EntryQueue[Waiter] = EntryQueue()
        self._due = math.inf  # when the queue is served, whether or not it fills a batch
        self._calls: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._began = threading.Condition(self._lock)
        self._running: _Pass[Waiter] | None = None
        self._is_unwatched = False
        self._hung: set[BatchedScorer] = set()
        self._is_closing = False
        self._thread = self._make_thread()

    def start(self) -> None:
        """Start the thread, and the one that watches it."""
        self._thread.start()
        if self._timeout_s < math.inf:
            threading.Thread(target=self._watch, name="rewards-watch", daemon=True).start()

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

        with self._lock:
            self._calls.append(run)
            self._wake.notify()
        return future

    def add(self, entries: Iterable[Entry[Waiter]], linger_s: float = 0.0) -> None:
        """Queue encoded entries of one scorer; fail them at once if it hangs.

        Parameters
        ----------
        entries : iterable of Entry
        linger_s : float
            Seconds for which these may wait for others to share a batch with. Without any, all
            that is queued goes as soon as the device is free.
        """
        entries = list(entries)
        with self._lock:
            refused = [entry for entry in entries if entry.scorer in self._hung]
            self._queue.add(entry for entry in entries if entry.scorer not in self._hung)
            self._due = min(self._due, time.monotonic() + linger_s)
            self._wake.notify()
        if refused:
            self._on_batch(refused, HungError(self._timeout_s))

    def flush(self) -> None:
        """Let nothing that is queued wait any longer for others."""
        with self._lock:
            self._due = min(self._due, time.monotonic())
            self._wake.notify()

    def discard(self, entries: Iterable[Entry[Waiter]]) -> None:
        """Drop queued entries; those in the running batch run to its end."""
        with self._lock:
            self._queue.discard(entries)

    @property
    def n_queued(self) -> int:
        """Entries that wait for the device, those of the running batch not counted."""
        with self._lock:
            return len(self._queue)

    def is_hung(self, scorer: BatchedScorer) -> bool:
        """Return whether a forward pass of this scorer was given up and has not ended yet."""
        with self._lock:
            return scorer in self._hung

    def close(self) -> None:
        """End the thread after the running batch; what is queued is not scored."""
        with self._lock:
            self._is_closing = True
            self._wake.notify_all()
            self._began.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended, at most ``timeout_s`` seconds."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _make_thread(self) -> threading.Thread:
        # A daemon: a server that is told to stop must not wait for a hung device.
        return threading.Thread(target=self._run, name="rewards-device", daemon=True)

    def _run(self) -> None:
        while True:
            with self._lock:
                while (left := self._left()) > 0:
                    self._wake.wait(None if left == math.inf else left)
                if self._is_closing:
                    return
                call = self._calls.popleft() if self._calls else None
                if call is None:
                    running = _Pass(self._queue.take(self.budgets.of), time.monotonic())
                    if not len(self._queue):
                        self._due = math.inf
                    self._running = running
                    if self._is_unwatched:
                        self._began.notify()
            if call is not None:
                call()
            elif not self._finish(running, self._forward(running.batch)):
                return

    def _left(self) -> float:
        """Return the seconds until there is something to do; infinite when nothing waits."""
        if self._is_closing or self._calls:
            return 0.0
        if not len(self._queue):
            return math.inf
        left = self._due - time.monotonic()
        return 0.0 if left > 0 and self._queue.fills(self.budgets.of) else left

    def _forward(self, batch: list[Entry[Waiter]]) -> FloatArray | Exception:
        try:
            tokens = [entry.tokens for entry in batch if entry.tokens is not None]
            scorer = batch[0].scorer
            return as_rows(scorer.forward(tokens), len(batch), len(scorer.outputs))
        except Exception as error:  # noqa: BLE001 - any failure belongs to this batch; the loop goes on
            # The frames of the pass hold its tensors, and the next try needs their memory.
            return error.with_traceback(None) if is_out_of_memory(error) else error

    def _finish(self, running: _Pass[Waiter], outcome: FloatArray | Exception) -> bool:
        """Tell the outcome of a pass; return False when it was given up meanwhile."""
        batch, scorer = running.batch, running.batch[0].scorer
        with self._lock:
            if self._running is not running:
                self._hung.discard(scorer)
                return False
            self._running = None
            if not isinstance(outcome, Exception):
                self.budgets.went_well(scorer)
            elif is_out_of_memory(outcome):
                self.budgets.ran_out(scorer, max(map(len, batch)) * len(batch))
                if len(batch) > 1:  # once more, in smaller batches
                    self._queue.put_back(batch)
                    self._due = -math.inf
                    return True
        self._on_batch(batch, outcome)
        return True

    def _watch(self) -> None:
        """Give up passes that take too long; on a thread of its own."""
        while True:
            with self._lock:
                running = self._running
                if self._is_closing:
                    return
                left = math.inf
                if running is not None:
                    left = running.started + self._timeout_s - time.monotonic()
                if left > 0:
                    # Woken by a pass only when none ran; it need not look at each of many.
                    self._is_unwatched = running is None
                    self._began.wait(None if left == math.inf else left)
                    self._is_unwatched = False
                    continue
                assert running is not None
                scorer = running.batch[0].scorer
                self._hung.add(scorer)
                self._running = None
                lost = running.batch + self._queue.take_all(scorer)
                self._thread = self._make_thread()
                self._thread.start()
            self._on_batch(lost, HungError(self._timeout_s))
