"""Which inputs share a forward pass, and how they are padded. Pure: no torch, no threads.

The cost of a batch is its *padded* size, the longest input times the number of inputs: padding is
computed like text. So inputs of like length go together, and the size of a batch is bounded in
padded tokens, never in inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rewards.base import BatchedScorer, Rendered, Tokens

Waiter = TypeVar("Waiter")
IntArray = NDArray[np.int64]

# A batch is chosen among the oldest inputs only, this many batches deep. Choosing among all of
# them would pad a little less, but under load every request would finish as late as the last.
WINDOW_BATCHES = 4


@dataclass(slots=True, eq=False)
class Entry(Generic[Waiter]):
    """One distinct input on its way through the model, and everybody who waits for its score.

    Attributes
    ----------
    scorer : BatchedScorer
    key : bytes
        Equal for equal inputs.
    order : int
        Age: entries are created with increasing numbers.
    rendered : Rendered
    tokens : Tokens or None
        None until encoded.
    waiters : list
        Empty once every request that wanted it has gone; it is then not worth scoring.
    score : float
        NaN until scored.
    """

    scorer: BatchedScorer
    key: bytes
    order: int
    rendered: Rendered
    tokens: Tokens | None = None
    waiters: list[Waiter] = field(default_factory=list)
    score: float = float("nan")

    def __len__(self) -> int:
        """Return the number of tokens, 0 until encoded."""
        return 0 if self.tokens is None else len(self.tokens)


class EntryQueue(Generic[Waiter]):
    """Encoded entries that wait for the device, oldest first; one line per scorer.

    Not locked: the worker guards it.
    """

    def __init__(self) -> None:
        self._lines: dict[BatchedScorer, dict[int, Entry[Waiter]]] = {}

    def __len__(self) -> int:
        """Return the number of entries waiting."""
        return sum(len(line) for line in self._lines.values())

    def add(self, entries: Iterable[Entry[Waiter]]) -> None:
        """Queue encoded entries behind the older ones."""
        for entry in entries:
            self._lines.setdefault(entry.scorer, {})[entry.order] = entry

    def discard(self, entries: Iterable[Entry[Waiter]]) -> None:
        """Drop entries that nobody waits for any more; those already taken are left alone."""
        for entry in entries:
            self._lines.get(entry.scorer, {}).pop(entry.order, None)

    def take(self, max_batch_tokens: int) -> list[Entry[Waiter]]:
        """Remove and return the next batch; empty when nothing waits.

        Parameters
        ----------
        max_batch_tokens : int
            Bound on the padded size of the batch. An entry that exceeds it alone goes alone.

        Notes
        -----
        The scorer whose oldest entry is the oldest of all goes first, so none is starved, and that
        entry is in the batch.
        """
        lines = [line for line in self._lines.values() if line]
        if not lines:
            return []
        line = min(lines, key=lambda candidate: next(iter(candidate)))
        window: list[Entry[Waiter]] = []
        total = 0
        for entry in line.values():
            if total > WINDOW_BATCHES * max_batch_tokens:
                break
            window.append(entry)
            total += len(entry)
        chosen = choose([len(entry) for entry in window], max_batch_tokens)
        batch = [window[index] for index in chosen]
        for entry in batch:
            del line[entry.order]
        return batch


def choose(lengths: Sequence[int], max_batch_tokens: int) -> list[int]:
    """Return the positions of the next batch: position 0 and those of the closest length.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of the inputs, the oldest first; not empty.
    max_batch_tokens : int
        Bound on the longest length times the number chosen.

    Returns
    -------
    list of int
        By length. The padded size keeps the bound unless position 0 exceeds it alone.
    """
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    low = high = by_length.index(0)  # by_length[low..high] is the batch; it grows both ways

    def fits(longest: int) -> bool:
        return longest * (high - low + 2) <= max_batch_tokens

    oldest = lengths[0]
    while True:
        longest = lengths[by_length[high]]
        can_shorter = low > 0 and fits(longest)
        can_longer = high + 1 < len(lengths) and fits(lengths[by_length[high + 1]])
        if can_shorter and can_longer:
            gap_below = oldest - lengths[by_length[low - 1]]
            gap_above = lengths[by_length[high + 1]] - oldest
            can_longer = gap_above <= gap_below
        if can_longer:
            high += 1
        elif can_shorter:
            low -= 1
        else:
            return by_length[low : high + 1]


def pad(batch: Sequence[Tokens], pad_id: int) -> tuple[IntArray, IntArray, IntArray]:
    """Return ids, attention mask and segment ids, each of shape (n_inputs, n_longest).

    Always on the right: padding on the left shifts the positions of most encoders and of GPT-2,
    whatever the tokenizer's own setting says, and gives wrong scores without an error.
    """
    shape = (len(batch), max(len(tokens) for tokens in batch))
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    type_ids = np.zeros(shape, dtype=np.int64)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = tokens.ids
        mask[row, : len(tokens)] = 1
        type_ids[row, : len(tokens)] = tokens.type_ids
    return ids, mask, type_ids
