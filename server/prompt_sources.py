"""Where the prompts of a calibration come from: a file, a data set, or what ships with Palette."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rewards import Message
from server import embedded
from server.prompts import Conversation, PromptsError, parse_prompt, read_prompts

# Prompts of a data set when no number is given: a standard error of a twentieth of the spread
# between prompts.
DATASET_PROMPTS = 400
# Rows that a streamed sample is shuffled among: data sets are often sorted.
_SHUFFLED_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class PromptSource:
    """What to calibrate on.

    Attributes
    ----------
    prompts : Path or None
        JSONL file; without it and without `dataset`, the prompts that ship with Palette.
    dataset : str or None
        Hugging Face data set, ``owner/name`` or ``owner/name:split``.
    column : str
        Of the data set: texts, or lists of messages.
    limit : int or None
        The first so many; of a data set, 400 by default.
    is_sample : bool
        A random sample instead of the first.
    system : str or None
        System prompt that every prompt gets, in the place of its own.
    """

    prompts: Path | None = None
    dataset: str | None = None
    column: str = "prompt"
    limit: int | None = None
    is_sample: bool = False
    system: str | None = None

    def read(self, seed: int) -> tuple[list[Conversation], str]:
        """Return the prompts, the same ones for the same seed, and where they are from.

        Raises
        ------
        PromptsError
            With the place and the remedy.
        """
        if self.dataset is not None:
            found = _read_dataset(
                self.dataset, self.column, self.limit or DATASET_PROMPTS, self.is_sample, seed
            )
            source = f"data set {self.dataset}, column {self.column}"
        else:
            found = read_prompts(self.prompts or embedded.PROMPTS)
            if self.is_sample:
                random.Random(seed).shuffle(found)
            found = found[: self.limit]
            source = self.prompts.name if self.prompts else "the shipped general prompts"
        if self.system is not None:
            found = [_under(self.system, messages) for messages in found]
        return found, source


def _under(system: str, messages: Conversation) -> Conversation:
    others = (message for message in messages if message["role"] != "system")
    return (Message(role="system", content=system), *others)


def _read_dataset(
    dataset: str, column: str, limit: int, is_sample: bool, seed: int
) -> list[Conversation]:
    name, _, split = dataset.partition(":")
    try:
        rows: Iterable[dict[str, Any]] = _stream(
            name, split or "train", seed if is_sample else None
        )
        found = list(islice(_conversations(rows, dataset, column), limit))
    except PromptsError:
        raise
    except Exception as error:
        # Its errors, and those of the network below it, have no root in common.
        reason = str(error).partition("\n")[0] or type(error).__name__
        msg = (
            f"--dataset {dataset} cannot be read: {reason}; check the name "
            "(owner/name:split), and that this machine reaches the hub, or write the prompts to a "
            "JSONL file for --prompts"
        )
        raise PromptsError(msg) from error
    if not found:
        msg = f"--dataset {dataset} has no rows; name another split with owner/name:split"
        raise PromptsError(msg)
    return found


def _stream(name: str, split: str, seed: int | None) -> Any:
    """Return the rows, downloaded as they are read; shuffled with a seed."""
    try:
        import datasets
    except ImportError as error:
        msg = "--dataset needs the library `datasets`: pip install 'palette-server[datasets]'"
        raise PromptsError(msg) from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        # Before, a data set could bring code of its own.
        msg = f"--dataset needs datasets 4 or newer, not {datasets.__version__}: upgrade it"
        raise PromptsError(msg)
    rows = datasets.load_dataset(name, split=split, streaming=True)
    return rows if seed is None else rows.shuffle(seed=seed, buffer_size=_SHUFFLED_ROWS)


def _conversations(
    rows: Iterable[dict[str, Any]], dataset: str, column: str
) -> Iterator[Conversation]:
    for number, row in enumerate(rows, start=1):
        if column not in row:
            msg = f"--dataset {dataset} has no column {column!r}; it has {', '.join(sorted(row))}"
            raise PromptsError(msg)
        value = row[column]
        if isinstance(value, list):
            # A whole conversation: its last answer is what the model is to give.
            while value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
                value = value[:-1]
        try:
            yield parse_prompt(value)
        except ValueError as error:
            msg = f"--dataset {dataset}, row {number}, column {column!r}: {error}"
            raise PromptsError(msg) from error
