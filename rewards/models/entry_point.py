"""Scorers of one's own: a Python function that the rewards file names and trusts."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from typing_extensions import override

from rewards.base import TRIAL, DirectScorer, FloatArray, Message, Sample
from rewards.config import PythonConfig
from rewards.config_file import suggest
from rewards.errors import RewardModelError, ScoringError

_QUESTION = Message(role="user", content="What is the capital of France?")
_ANSWERS = ("Paris.", "I do not know, and I would rather talk about something else.")


class EntryPointScorer(DirectScorer):
    """Calls ``function(samples, **options)``, which gives shape (n,) or (n, n_values).

    Parameters
    ----------
    name, values
        As for every scorer.
    config : PythonConfig

    Attributes
    ----------
    n_threads : int
        Calls of ``score`` that may run at once: one, so the function need not be thread-safe.

    Notes
    -----
    Its identity holds the source of the named module, and of the one that defines the function;
    what those import, or read, cannot be seen.
    """

    n_threads = 1

    def __init__(self, name: str, values: Sequence[str], config: PythonConfig) -> None:
        super().__init__(name, values)
        self.needs_logprobs = config.needs_logprobs
        self._config = config
        self._sources: dict[str, str] = {}

    @override
    def identity(self, output: str) -> dict[str, object]:
        fields = {"kind", "entry_point", "options", "index"}
        return {**self._config.model_dump(include=fields), "sources": self._sources}

    @override
    def load(self, device: str) -> None:
        module_name, _, function_name = self._config.entry_point.partition(":")
        module = self._import(module_name)
        function = getattr(module, function_name, None)
        if function is None:
            names = [name for name, one in vars(module).items() if inspect.isroutine(one)]
            raise self._error(f"the module has no {function_name}; {suggest(function_name, names)}")
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise self._error(f"{function_name} must be a plain function: no class, no async def")
        self._function: Callable[..., Any] = function
        self._check_options(function)
        home = sys.modules.get(getattr(inspect.unwrap(function), "__module__", ""), module)
        self._sources = {one.__name__: self._hash(one) for one in (module, home)}
        logprobs = (-1.0, -2.0) if self.needs_logprobs else None
        try:
            self.score([Sample((_QUESTION,), answer, logprobs) for answer in _ANSWERS])
        except ScoringError as error:
            raise self._error(f"a trial run failed: {error}") from None

    @override
    def trial(self) -> Sample | None:
        return TRIAL

    @override
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        if self.needs_logprobs and any(sample.token_logprobs is None for sample in samples):
            raise self._failure(
                "it reads the sampler's token log-probabilities and this sample has none; use a "
                "backend that reports them, or leave this value out"
            )
        try:
            given = self._function(tuple(samples), **self._config.options)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - any failure is this request's
            # The message is left out, for it may quote what was scored.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            raise self._failure(f"the function raised {type(error).__name__} ({place})") from None
        problem = f"the function gave {type(given).__name__}, not one number for each sample"
        try:
            numbers = np.asarray(given)
        except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor with a gradient
            raise self._failure(problem) from None
        if numbers.dtype.kind not in "buif":
            raise self._failure(problem)  # numpy would turn the text "3" into 3 silently
        scores = self._choose(numbers.astype(np.float64), len(samples))
        if not np.isfinite(scores).all():
            raise self._failure("the function gave a number that is not finite")
        return scores

    def _choose(self, scores: FloatArray, n: int) -> FloatArray:
        """Return the column that is read, shape (n,)."""
        index = self._config.index
        if scores.ndim not in (1, 2) or scores.shape[0] != n or 0 in scores.shape:
            problem = f"the function gave the shape {scores.shape} for {n} samples; give ({n},)"
            raise self._failure(problem)
        columns = scores.reshape(n, -1)
        if index is None and columns.shape[1] > 1:
            raise self._failure(f"the function gives {columns.shape[1]} columns; choose an index")
        if index is not None and index >= columns.shape[1]:
            raise self._failure(f"the function gives {columns.shape[1]} columns, index is {index}")
        return columns[:, index or 0]

    def _import(self, name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                problem = (
                    f"there is no module {error.name}; install it, or put its folder on PYTHONPATH"
                )
            else:
                problem = f"importing it needs the module {error.name}; install that"
            raise self._error(problem) from error
        except (Exception, SystemExit) as error:
            raise self._error(f"importing it raised {type(error).__name__}: {error}") from error

    def _check_options(self, function: Callable[..., Any]) -> None:
        try:
            inspect.signature(function).bind((), **self._config.options)
        except TypeError as error:
            problem = f"it cannot be called with (samples, **options): {error}; correct the options"
            raise self._error(problem) from None
        except ValueError:
            return  # compiled functions may have no signature; the trial run tells

    def _hash(self, module: ModuleType) -> str:
        source = getattr(module, "__file__", None)
        if source is None:
            raise self._error(f"{module.__name__} has no file, so a change of it could not be seen")
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()

    def _failure(self, problem: str) -> ScoringError:
        return ScoringError(self.name, self.values, f"{self._config.entry_point}: {problem}")

    def _error(self, problem: str) -> RewardModelError:
        return RewardModelError(self.name, self.values, self._config.entry_point, problem)
