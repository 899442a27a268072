"""Threads of one direct scorer: what waits, runs long or hangs there holds up nobody else."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from rewards.errors import HungError, RewardError

Result = TypeVar("Result")

_CLOSED = "the reward suite was closed while it was scoring"


class _Call(Generic[Result]):
    """A function, its result to be, and when it began to run: infinity before it does."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self.function = function
        self.future: Future[Result] = Future()
        self.started = math.inf
        self.is_given_up = False


class Lane:
    """So many calls run at once, the others wait their turn; a call that hangs is given up.

    Parameters
    ----------
    name : str
    n_threads : int
    timeout_s : float
        Longest call, in seconds.

    Notes
    -----
    The threads are daemons, as an executor's are not: a hung call must not keep a process alive.
    """

    def __init__(self, name: str, n_threads: int, timeout_s: float) -> None:
        self._name = name
        self._n_threads = n_threads
        self._timeout_s = timeout_s
        self._calls: deque[_Call[object]] = deque()
        self._running: set[_Call[object]] = set()
        self._wake = threading.Condition()
        self._n_started = self._n_idle = self._n_given_up = 0
        self._is_closing = False

    @property
    def is_hung(self) -> bool:
        """Whether every thread is in a call that was given up and has not ended yet."""
        with self._wake:
            return self._n_given_up == self._n_threads

    async def run(self, function: Callable[[], Result]) -> Result:
        """Return what a function returns, off the event loop.

        Raises
        ------
        HungError
            When it takes too long, or none can run because those that do hang.
        RewardError
            When the lane is closed before it began.
        """
        call = _Call(function)
        self._enter(call)
        result = asyncio.wrap_future(call.future)
        left = self._timeout_s
        try:
            while True:
                done, _ = await asyncio.wait({result}, timeout=left)
                if done:
                    return result.result()
                left = self._look(call)
        finally:
            result.cancel()  # a call that has not begun never does

    def close(self) -> None:
        """End the threads once the calls that run are through; calls that wait fail."""
        with self._wake:
            self._is_closing = True
            for call in self._calls:
                if call.future.set_running_or_notify_cancel():
                    call.future.set_exception(RewardError(_CLOSED))
            self._calls.clear()
            self._wake.notify_all()

    def _enter(self, call: _Call[Result]) -> None:
        with self._wake:
            if self._is_closing:
                raise RewardError(_CLOSED)
            if self._n_given_up == self._n_threads:
                raise HungError(self._timeout_s)
            self._calls.append(call)  # type: ignore[arg-type]  # results are not mixed up
            if self._n_idle < len(self._calls) and self._n_started < self._n_threads:
                self._n_started += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            self._wake.notify()

    def _look(self, call: _Call[Result]) -> float:
        """Give up calls that take too long, whoever waits for them; return when to look again."""
        now = time.monotonic()
        with self._wake:
            for other in self._running:
                if not other.is_given_up and now >= other.started + self._timeout_s:
                    other.is_given_up = True
                    self._n_given_up += 1
            if call.is_given_up or self._n_given_up == self._n_threads:
                raise HungError(self._timeout_s)
            return max(0.001, min(call.started, now) + self._timeout_s - now)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._n_idle += 1
                while not (self._calls or self._is_closing):
                    self._wake.wait()
                self._n_idle -= 1
                if self._is_closing:
                    return
                call = self._calls.popleft()
                if not call.future.set_running_or_notify_cancel():
                    continue
                call.started = time.monotonic()
                self._running.add(call)
            try:
                outcome: object = call.function()
                error: BaseException | None = None
            except BaseException as caught:  # noqa: BLE001 - it is raised again where it is awaited
                outcome, error = None, caught
            with self._wake:
                self._running.discard(call)
                self._n_given_up -= call.is_given_up
                # Set under the lock: nobody can give it up in between.
                if error is None:
                    call.future.set_result(outcome)
                else:
                    call.future.set_exception(error)
