"""Token ids to text: token strings, whole answers, and the search for stop strings on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Detokenizer:
    """What a tokenizer's ids mean as text, special tokens left out of answers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._strings: dict[int, str] = {}
        # Some tokenizers drop the space before the first token they decode, so a token's own
        # string is what it adds behind this one.
        anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor: list[int] = anchor
        self._anchor_text = self._decode(anchor, skip_special_tokens=False)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer."""
        return self._decode(list(ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """Return the string of one token; part of a character is U+FFFD."""
        string = self._strings.get(token_id)
        if string is None:
            string = self._decode([*self._anchor, token_id], skip_special_tokens=False)
            if string.startswith(self._anchor_text):
                string = string[len(self._anchor_text) :]
            else:
                string = self._decode([token_id], skip_special_tokens=False)
            self._strings[token_id] = string
        return string

    def _decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        # The "clean up" of old tokenizers changes text ("it 's" -> "it's"), and depends on context.
        text = self._tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)


class StopFinder:
    """Finds the first stop string in an answer that grows by one token at a time.

    Text is taken from the decoder in windows, as vLLM and text-generation-inference do it: the
    difference between decoding the last tokens with and without the new one, held back while it
    ends in an incomplete character. The cost of a token does not grow with the answer.

    Parameters
    ----------
    detokenizer : Detokenizer
    stop : tuple of str
        Not empty, and no empty string in it.
    """

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._longest = max(map(len, stop))
        self._ids: list[int] = []
        self._starts: list[int] = []  # characters before each token
        self._text = ""
        self._window = 0  # first token of the window; text of tokens before `_read` is in `_text`
        self._read = 0
        self._window_text = ""

    def push(self, token_id: int) -> str | None:
        """Take a token; return the answer when a stop string is complete, else None."""
        self._ids.append(token_id)
        self._starts.append(len(self._text))
        grown = self._detokenizer.text(self._ids[self._window :])[len(self._window_text) :]
        whole = grown.rstrip("\ufffd")
        known = len(self._text)
        text = self._text + whole
        if grown and whole == grown:
            self._text = text
            self._window, self._read = self._read, len(self._ids)
            self._window_text = self._detokenizer.text(self._ids[self._window :])
        # A stop string may begin in older text, but it must end in the new.
        begin = max(0, known - self._longest + 1)
        found = [text.find(stop, begin) for stop in self._stop]
        cut = min((place for place in found if place >= 0), default=-1)
        return None if cut < 0 else text[:cut]

    def n_tokens_of(self, text: str) -> int:
        """Return how many tokens, from the first, have a part in `text`."""
        return sum(1 for start in self._starts if start < len(text))
