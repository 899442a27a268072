"""What can go wrong with rewards: one root, one class per moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class RewardError(Exception):
    """Root of every error of this package; raised itself for a wrong call (message says which)."""


class RewardConfigError(RewardError):
    """The rewards file is wrong. The message reads ``file:line: field: problem. remedy``.

    Attributes
    ----------
    path : Path
        The rewards file.
    line : int or None
        Line of the offending field, counted from 1; None when the whole file is meant.
    field : str
        Dotted name of the offending field, empty when the whole file is meant.
    """

    def __init__(self, path: Path, line: int | None, field: str, problem: str) -> None:
        self.path = path
        self.line = line
        self.field = field
        where = f"{path}:{line}" if line is not None else str(path)
        super().__init__(f"{where}: {field}: {problem}" if field else f"{where}: {problem}")


class RewardModelError(RewardError):
    """A reward model cannot be used: missing, damaged, or not the model its entry describes.

    Attributes
    ----------
    scorer : str
        Name of the scorer in the rewards file.
    values : tuple of str
        Values that this scorer feeds.
    model : str
        Folder or hub name.
    """

    def __init__(self, scorer: str, values: Sequence[str], model: str, problem: str) -> None:
        self.scorer = scorer
        self.values = tuple(values)
        self.model = model
        fed = ", ".join(self.values) or "no value"
        super().__init__(f"scorer {scorer!r} (feeds {fed}), model {model}: {problem}")


class ScoringError(RewardError):
    """A sample could not be scored: a forward pass failed, or gave a number that is not finite.

    Attributes
    ----------
    scorer : str
        Name of the scorer in the rewards file.
    values : tuple of str
        Values that this scorer feeds.
    """

    def __init__(self, scorer: str, values: Sequence[str], problem: str) -> None:
        self.scorer = scorer
        self.values = tuple(values)
        fed = ", ".join(self.values) or "no value"
        super().__init__(f"scorer {scorer!r} (feeds {fed}): {problem}")


class RewardQueueFullError(RewardError):
    """Too many inputs wait for the reward models already; the caller should come back later.

    Attributes
    ----------
    retry_after_s : int
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class HungError(RewardError):
    """A scorer does not come back: what `ScoringError` then has as its cause."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"it hangs: a pass took more than {timeout_s:g} s and was given up; until it ends, "
            "this scorer serves nobody. Look at its model and device, or raise reward_timeout_s"
        )
