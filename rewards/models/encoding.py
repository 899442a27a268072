"""Texts to token ids, shortened where it hurts least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Encoding, Tokenizer

from rewards.base import Rendered, Tokens

# From a rendering, and where each token stands in the text that holds the answer, in characters
# ((-1, -1) elsewhere), to the places of the tokens that are read.
Mark = Callable[[Rendered, Sequence[tuple[int, int]]], Sequence[int]]


class Encoder:
    """Encodes renderings with a fast tokenizer and its own special tokens.

    Parameters
    ----------
    backend : Tokenizer
        It is copied: a tokenizer file may carry truncation and fixed padding of its own (that of
        all-MiniLM makes every text 128 tokens long), and both are ours to decide.
    max_length : int
        Longest input, special tokens included.
    adds_special_tokens : bool
        False for chat templates, which write theirs into the text: adding them again would double
        the first one.
    start_id : int or None
        Kept at the head of a text that has it there (chat templates), whatever else is cut.
    empty_id : int
        Stands for a text without any token, which no model can read.
    mark : callable or None
        Chooses the marks of an input; what is cut off is no longer marked.
    """

    def __init__(
        self,
        backend: Tokenizer,
        max_length: int,
        *,
        adds_special_tokens: bool,
        start_id: int | None,
        empty_id: int,
        mark: Mark | None = None,
    ) -> None:
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._max_length = max_length
        self._adds_special_tokens = adds_special_tokens
        self._start_id = start_id
        self._empty_id = empty_id
        self._mark = mark

    def __call__(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """Return the tokens of each rendering: 1 to ``max_length`` of them."""
        texts = [item.text if item.first is None else (item.first, item.text) for item in rendered]
        encodings = self._backend.encode_batch(texts, add_special_tokens=self._adds_special_tokens)
        return [
            self._tokens(encoding, item) for encoding, item in zip(encodings, rendered, strict=True)
        ]

    def _tokens(self, encoding: Encoding, rendered: Rendered) -> Tokens:
        ids, type_ids = encoding.ids, encoding.type_ids
        if not ids:
            return Tokens([self._empty_id], [0])
        marks: Sequence[int] = ()
        if self._mark is not None:
            member = 0 if rendered.first is None else 1
            offsets = [
                offset if sequence == member else (-1, -1)
                for sequence, offset in zip(encoding.sequence_ids, encoding.offsets, strict=True)
            ]
            marks = self._mark(rendered, offsets)
        if len(ids) <= self._max_length:
            return Tokens(ids, type_ids, tuple(marks))
        kept = self._keep(encoding, rendered)
        moved = {place: index for index, place in enumerate(kept)}
        return Tokens(
            [ids[place] for place in kept],
            [type_ids[place] for place in kept],
            tuple(moved[place] for place in marks if place in moved),
        )

    def _keep(self, encoding: Encoding, rendered: Rendered) -> list[int]:
        """Cut what stands before the answer from its left, then the answer from its right.

        The end of the prompt is what the answer answers, and what stands behind the answer (an
        end marker) is where causal models are read.
        """
        ids = encoding.ids
        n_excess = len(ids) - self._max_length
        member = 0 if rendered.first is None else 1
        before, inside = [], []
        for place, (sequence, (start, _)) in enumerate(
            zip(encoding.sequence_ids, encoding.offsets, strict=True)
        ):
            if sequence is None or (place == 0 and ids[0] == self._start_id):
                continue
            if sequence != member or start < rendered.start:
                before.append(place)
            elif start < rendered.end:
                inside.append(place)
        dropped = set(before[:n_excess])
        if len(dropped) < n_excess:
            dropped.update(inside[-(n_excess - len(dropped)) :])
        return [place for place in range(len(ids)) if place not in dropped][: self._max_length]
