"""Keeps an engine running: notices its end, tells who waits for it, and starts it again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from server.backends.base import BackendUnavailableError, ModelLoadError

logger = logging.getLogger(__name__)


class Running(Protocol):
    """What a supervisor needs of an engine."""

    def watch(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` once, in the running loop, when the engine ends."""

    def unwatch(self) -> None:
        """Forget `on_end`."""

    def reason(self) -> str:
        """Return why it ended, as far as it said so."""

    def shutdown(self) -> None:
        """End it and free what it holds; blocks."""


E = TypeVar("E", bound=Running)


class Supervisor(Generic[E]):
    """One engine at a time, used from one event loop.

    Parameters
    ----------
    start : callable
        Returns a new engine; run in a thread.
    on_end : callable
        Called in the loop when an engine ends unasked, with what to tell its requests.
    max_restarts : int
        Restarts within `window_s` at most; then the engine stays down.
    window_s : float
        Seconds after which a restart no longer counts.
    backoff_s : float
        Seconds before the first restart of a window; each next one waits twice as long.
    """

    def __init__(
        self,
        start: Callable[[], E],
        on_end: Callable[[BackendUnavailableError], None],
        *,
        max_restarts: int,
        window_s: float = 3600.0,
        backoff_s: float = 1.0,
    ) -> None:
        self._start = start
        self._on_end = on_end
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._backoff_s = backoff_s
        self._engine: E | None = None
        self._ended = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._restarts: deque[float] = deque()
        self._n_restarts = 0
        self._last_error: str | None = None
        self._has_given_up = False

    @property
    def engine(self) -> E:
        """The running engine.

        Raises
        ------
        BackendUnavailableError
            While there is none.
        """
        if self._engine is None or self._ended.is_set():
            raise self._unavailable()
        return self._engine

    async def start(self) -> E:
        """Return the first engine, started.

        Raises
        ------
        ModelLoadError
        """
        engine = await self._start_shielded()
        self._adopt(engine)
        self._keeper = asyncio.create_task(self._keep(), name="palette-engine-supervisor")
        return engine

    async def close(self) -> None:
        """End the engine; no other is started. Idempotent."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        await self._discard()

    def report_end(self, engine: E) -> None:
        """Take it that `engine` has ended, whatever its process looks like."""
        if engine is self._engine:
            self._ended.set()

    def health(self) -> dict[str, object]:
        """Return the state, how often the engine was restarted and why."""
        if self._keeper is None:
            state = "stopped"
        else:
            state = "failing" if self._engine is None or self._ended.is_set() else "ok"
        return {
            "state": state,
            "restarts": self._n_restarts,
            "gave_up": self._has_given_up,
            "last_error": self._last_error,
        }

    def _adopt(self, engine: E) -> None:
        self._ended.clear()
        self._engine = engine
        engine.watch(self._ended.set)

    async def _keep(self) -> None:
        while True:
            await self._ended.wait()
            engine = self._engine
            said = engine.reason() if engine is not None else ""
            self._last_error = said or "the engine's process ended without a word (killed?)"
            logger.error("vLLM's engine ended: %s", self._last_error)
            self._on_end(self._unavailable())
            await self._discard()
            if not await self._restart():
                return

    async def _restart(self) -> bool:
        """Start engines until one runs; False when there have been too many."""
        while True:
            now = time.monotonic()
            while self._restarts and now - self._restarts[0] > self._window_s:
                self._restarts.popleft()
            if len(self._restarts) >= self._max_restarts:
                self._has_given_up = True
                logger.error(
                    "vLLM's engine was restarted %d times in %.0f s and stays down; restart the "
                    "server when its cause (%s) is mended",
                    len(self._restarts),
                    self._window_s,
                    self._last_error,
                )
                return False
            await asyncio.sleep(self._backoff_s * 2 ** len(self._restarts))
            self._restarts.append(time.monotonic())
            self._n_restarts += 1
            try:
                engine = await self._start_shielded()
            except ModelLoadError as error:
                self._last_error = str(error)
                logger.error("restarting vLLM's engine failed: %s", error)
                continue
            self._adopt(engine)
            logger.warning("vLLM's engine runs again, after restart %d", self._n_restarts)
            return True

    async def _start_shielded(self) -> E:
        """Return a new engine; when cancelled meanwhile, end it as soon as it is there."""
        starting = asyncio.create_task(asyncio.to_thread(self._start))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread cannot be interrupted, and its engine must not outlive the server.
            done = await asyncio.gather(starting, return_exceptions=True)
            if not isinstance(done[0], BaseException):
                await asyncio.to_thread(done[0].shutdown)
            raise

    async def _discard(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.unwatch()
            try:
                await asyncio.to_thread(engine.shutdown)
            except Exception:
                # Its process is gone or about to be; what is left must not stop a restart.
                logger.exception("shutting vLLM's engine down failed")

    def _unavailable(self) -> BackendUnavailableError:
        if self._keeper is None:
            return BackendUnavailableError("the model is not running; retry later")
        remedy = "its operator has to mend it" if self._has_given_up else "retry in a minute"
        return BackendUnavailableError(f"the model's engine has stopped; {remedy}")
