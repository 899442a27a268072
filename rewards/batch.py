"""Which inputs share a forward pass, and how they are padded. Pure: no torch, no threads.

The cost of a batch is what a forward pass costs to begin, plus its *padded* size, the longest input
times the number of inputs: padding is computed like text. So inputs of like length go together, the
size of a batch is bounded in padded tokens, never in inputs, and a batch is not filled up with
inputs whose padding would cost more than another forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rewards.base import BatchedScorer, FloatArray, Rendered, Tokens

Waiter = TypeVar("Waiter")
IntArray = NDArray[np.int64]

# A batch is chosen among the oldest inputs only, this many batches deep. Choosing among all of
# them would pad a little less, but under load every request would finish as late as the last.
WINDOW_BATCHES = 4


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How large a batch may become.

    Attributes
    ----------
    max_tokens : int
        Bound on the padded size of a batch.
    max_padding : int
        Bound on the padding in it, in tokens. Best is what one forward pass costs to begin,
        counted in tokens: on random lengths this greedy rule is then within 4 % of the cheapest
        partition, where filling every batch up costs 6 to 60 % more.
    """

    max_tokens: int
    max_padding: int


LimitsOf = Callable[[BatchedScorer], BatchLimits]


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
    size : int
        Tokens that it is taken for until they are counted.
    waiters : list
        Empty once every request that wanted it has gone; it is then not worth scoring.
    score : ndarray, shape (n_outputs,), or None
        None until scored.
    """

    scorer: BatchedScorer
    key: bytes
    order: int
    rendered: Rendered
    size: int = 0
    tokens: Tokens | None = None
    waiters: list[Waiter] = field(default_factory=list)
    score: FloatArray | None = None

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

    def put_back(self, entries: Iterable[Entry[Waiter]]) -> None:
        """Queue entries that were taken at their old places, but those nobody waits for."""
        for entry in entries:
            if entry.waiters:
                line = {**self._lines.get(entry.scorer, {}), entry.order: entry}
                self._lines[entry.scorer] = dict(sorted(line.items()))

    def take_all(self, scorer: BatchedScorer) -> list[Entry[Waiter]]:
        """Remove and return all entries of a scorer."""
        return list(self._lines.pop(scorer, {}).values())

    def fills(self, limits_of: LimitsOf) -> bool:
        """Return whether the entries of some scorer fill a batch."""
        return any(
            line and sum(map(len, line.values())) >= limits_of(scorer).max_tokens
            for scorer, line in self._lines.items()
        )

    def take(self, limits_of: LimitsOf) -> list[Entry[Waiter]]:
        """Remove and return the next batch; empty when nothing waits.

        An entry that exceeds the limits alone goes alone.

        Notes
        -----
        The scorer whose oldest entry is the oldest of all goes first, so none is starved, and that
        entry is in the batch.
        """
        lines = [line for line in self._lines.values() if line]
        if not lines:
            return []
        line = min(lines, key=lambda candidate: next(iter(candidate)))
        limits = limits_of(next(iter(line.values())).scorer)
        window: list[Entry[Waiter]] = []
        total = 0
        for entry in line.values():
            if total > WINDOW_BATCHES * limits.max_tokens:
                break
            window.append(entry)
            total += len(entry)
        chosen = choose([len(entry) for entry in window], limits)
        batch = [window[index] for index in chosen]
        for entry in batch:
            del line[entry.order]
        return batch


def choose(lengths: Sequence[int], limits: BatchLimits) -> list[int]:
    """Return the positions of the next batch: position 0 and those of the closest length.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of the inputs, the oldest first; not empty.
    limits : BatchLimits

    Returns
    -------
    list of int
        By length. Padded size and padding keep their limits unless position 0 alone exceeds one.
    """
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    low = by_length.index(0)
    high = low + 1  # the batch is by_length[low:high]; it grows both ways
    oldest = longest = lengths[0]
    padding = 0
    while True:
        n_inputs = high - low
        steps = []  # (distance from the oldest, new low, new high, new longest, new padding)
        if low > 0:
            length = lengths[by_length[low - 1]]
            steps.append((oldest - length, low - 1, high, longest, padding + longest - length))
        if high < len(lengths):
            length = lengths[by_length[high]]
            added = n_inputs * (length - longest)
            steps.append((length - oldest, low, high + 1, length, padding + added))
        allowed = [
            step
            for step in steps
            if step[3] * (n_inputs + 1) <= limits.max_tokens and step[4] <= limits.max_padding
        ]
        if not allowed:
            return by_length[low:high]
        _, low, high, longest, padding = min(allowed)


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
