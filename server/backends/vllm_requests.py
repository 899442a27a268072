"""Requests in vLLM's engine: what comes of each, in whose words one fails, what they took."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from server.backends.base import BackendError, BackendUnavailableError, PromptError
from server.backends.vllm_process import Engine
from server.backends.vllm_turns import Kind, TwoKinds, kind_of

T = TypeVar("T")


class Requests:
    """The requests of one backend, used from one event loop.

    Parameters
    ----------
    on_death : callable
        Called with the engine when a request finds that it has ended.
    """

    def __init__(self, on_death: Callable[[Engine], None]) -> None:
        self._on_death = on_death
        self._active: set[asyncio.Queue[Any]] = set()
        self._ids = itertools.count()
        self._kinds = TwoKinds()
        self._n_prompt_tokens = 0
        self._n_cached_tokens = 0
        self._n_asked_tokens = 0
        self._n_cached_asked_tokens = 0
        self._stages = {"waiting": 0.0, "prefill": 0.0, "decode": 0.0}

    @property
    def n_active(self) -> int:
        """Calls of `each` that are not at their end."""
        return len(self._active)

    async def each(
        self, engine: Engine, n: int, one: Callable[[int, str], Awaitable[T]]
    ) -> AsyncGenerator[T, None]:
        """Yield what `one` returns for each of n requests, as they finish.

        Close it when its consumer may end early: requests still in the engine are aborted then.

        Parameters
        ----------
        engine : Engine
        n : int
        one : callable
            Takes the request's index and its name in the engine; see `output`.

        Raises
        ------
        BackendError
            For the first that fails; the others are aborted.
        """
        arrivals: asyncio.Queue[T | BackendError] = asyncio.Queue()
        name = f"palette-{next(self._ids)}"

        async def run(index: int) -> None:
            try:
                arrivals.put_nowait(await one(index, f"{name}-{index}"))
            except Exception as error:  # noqa: BLE001  # told to the one who asked, below
                arrivals.put_nowait(self._translated(error, engine))

        self._active.add(arrivals)
        running = [asyncio.create_task(run(index)) for index in range(n)]
        try:
            for _ in range(n):
                item = await arrivals.get()
                if isinstance(item, BackendError):
                    raise item
                yield item
        finally:
            # Also when the consumer closes the iterator or its task is cancelled; a task that is
            # cancelled aborts its request in the engine.
            self._active.discard(arrivals)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def output(
        self, engine: Engine, token_ids: Sequence[int], params: Any, name: str, lora: Any
    ) -> Any:
        """Return vLLM's one output of a request, once the engine has it and may run it.

        Raises
        ------
        BackendError
            When there is none. vLLM's own errors are raised as they are: `each` translates.
        """
        tokens = {"type": "token", "prompt_token_ids": list(token_ids)}
        kind = kind_of(params)
        async with self._kinds.run(kind):
            async for result in engine.llm.generate(tokens, params, name, lora_request=lora):
                if result.finished:
                    self._count(kind, len(token_ids), result)
                    return result.outputs[0]
        raise BackendError("generation failed: the engine ended the request without an answer")

    def fail_all(self, error: BackendUnavailableError) -> None:
        """End every call of `each` with this error."""
        for arrivals in self._active:
            arrivals.put_nowait(error)

    def health(self) -> dict[str, object]:
        """Return how many there are, and what all of them took so far."""
        return {
            "active_jobs": self.n_active,
            "prompt_tokens": self._n_prompt_tokens,
            "cached_prompt_tokens": self._n_cached_tokens,
            "asked_tokens": self._n_asked_tokens,
            "cached_asked_tokens": self._n_cached_asked_tokens,
            # Seconds, summed over candidates; vLLM measures them with disable_log_stats=false only.
            "candidate_seconds": {name: round(spent, 3) for name, spent in self._stages.items()},
        }

    def _count(self, kind: Kind, n_tokens: int, result: Any) -> None:
        n_cached = result.num_cached_tokens or 0
        if kind == "asked":
            self._n_asked_tokens += n_tokens
            self._n_cached_asked_tokens += n_cached
            return
        self._n_prompt_tokens += n_tokens
        self._n_cached_tokens += n_cached
        if (times := result.metrics) is not None:
            self._stages["waiting"] += times.scheduled_ts - times.queued_ts
            self._stages["prefill"] += times.first_token_ts - times.scheduled_ts
            self._stages["decode"] += times.last_token_ts - times.first_token_ts

    def _translated(self, error: Exception, engine: Engine) -> BackendError:
        if isinstance(error, BackendError):
            return error
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        translated: BackendError
        if isinstance(error, EngineDeadError):
            self._on_death(engine)
            translated = BackendUnavailableError("the model's engine has stopped; retry later")
        elif isinstance(error, (VLLMValidationError, ValueError)):
            translated = PromptError(f"the engine refuses this request: {error}")
        else:
            cause = error.__cause__ or error
            translated = BackendError(f"generation failed: {type(cause).__name__}: {cause}")
        translated.__cause__ = error
        return translated
