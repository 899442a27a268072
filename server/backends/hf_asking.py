"""Questions about answers, read by a transformers model. All torch of asking is here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.backends.asking import common_prefix
from server.backends.base import BackendError
from server.backends.hf_decoding import Prefix, copy_prefix, read_prompt


@dataclass(slots=True, eq=False)
class Inquiry:
    """Some questions about one answer, and how what is found reaches who asked.

    Attributes
    ----------
    prompts : list of list of int
        One a question.
    head : tuple of int
        The conversation's own prompt, with which they begin; shared with its other answers.
    word_ids : list of list of int
    deliver : callable
        Called in the worker thread, once.
    is_cancelled : bool
        Set from any thread.
    """

    prompts: list[list[int]]
    head: tuple[int, ...]
    word_ids: list[list[int]]
    deliver: Callable[[NDArray[np.float64] | BackendError], None]
    is_cancelled: bool = False


class Reader:
    """Reads what questions have in common once: a conversation's prompt, then the answer.

    Only where the model reads in pieces as it reads at once, which is tried with the first
    inquiry; otherwise each question is read from the beginning.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._in_pieces: bool | None = None
        self._head: tuple[int, ...] = ()
        self._read: Prefix | None = None

    def answer(self, inquiry: Inquiry) -> NDArray[np.float64]:
        """Return log-probabilities, shape (n_questions, n_sets of words).

        Raises
        ------
        BackendError
            When they are not numbers.
        """
        if self._in_pieces is None:
            self._in_pieces = self._reads_in_pieces()
        prompts = inquiry.prompts
        cache = None
        if self._in_pieces:
            cache, n_read = self._begin(inquiry)
            prompts = [ids[n_read:] for ids in prompts]
            cache.reorder_cache(torch.zeros(len(prompts), dtype=torch.long, device=self._device))
        logprobs = self._ends(prompts, cache).log_softmax(dim=-1)
        found = torch.stack(
            [logprobs[:, ids].logsumexp(dim=-1) for ids in inquiry.word_ids], dim=-1
        )
        if not found.isfinite().all():
            raise BackendError("the model's log-probabilities are not numbers (NaN)")
        return np.asarray(found.double().cpu().numpy())

    def forget(self) -> None:
        """Free the memory of the last prompt."""
        self._head, self._read = (), None

    @property
    def head(self) -> tuple[int, ...]:
        """Return the prompt that is read already; inquiries that share it are the cheapest."""
        return self._head

    def _begin(self, inquiry: Inquiry) -> tuple[Any, int]:
        """Return the cache of what the prompts share, of one row, and its tokens."""
        prompts, head = inquiry.prompts, inquiry.head
        shared = common_prefix(prompts)
        # A prompt that was too long has lost its beginning.
        if not 0 < len(head) < shared or tuple(prompts[0][: len(head)]) != head:
            return read_prompt(self._model, prompts[0][:shared], self._device).cache, shared
        if self._read is None or head != self._head:
            self.forget()
            self._read = read_prompt(self._model, head, self._device)
            self._head = head
        cache = copy_prefix(self._read).cache
        self._ends([prompts[0][len(head) : shared]], cache)
        return cache, shared

    def _ends(self, rows: Sequence[Sequence[int]], cache: Any) -> torch.Tensor:
        """Return the logits behind the last token of each row, shape (n_rows, n_vocab).

        Rows are padded on the right: what follows a token does not reach it.
        """
        longest = max(map(len, rows))
        padded = [[*ids, *([ids[-1]] * (longest - len(ids)))] for ids in rows]
        at = [len(ids) - 1 for ids in rows]
        options: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            kept = sorted(set(at))
            at = [kept.index(place) for place in at]
            options["logits_to_keep"] = torch.tensor(kept, device=self._device)
        output = self._model(
            input_ids=torch.tensor(padded, device=self._device),
            past_key_values=cache,
            use_cache=cache is not None,
            return_dict=True,
            **options,
        )
        logits: torch.Tensor = output.logits[range(len(rows)), at]
        return logits.float()

    def _reads_in_pieces(self) -> bool:
        """Whether reading from a cache that was repeated gives what reading at once does."""
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        ids = [(7 * i + 3) % vocabulary for i in range(14)]
        rows = [ids, ids[:-2]]
        whole = self._ends(rows, None)
        try:
            cache = copy_prefix(read_prompt(self._model, ids[:5], self._device)).cache
            self._ends([ids[5:9]], cache)
            cache.reorder_cache(torch.zeros(2, dtype=torch.long, device=self._device))
            pieces = self._ends([row[9:] for row in rows], cache)
        except Exception:  # noqa: BLE001 - whatever a model's code raises: it then reads at once
            return False
        # Rounding only; a lost state is off by whole nats. Half precision rounds coarsely.
        tolerance = 1e-3 if next(self._model.parameters()).dtype == torch.float32 else 0.5
        difference = (whole.softmax(dim=-1) - pieces.softmax(dim=-1)).abs().sum(dim=-1).max()
        return bool(difference <= tolerance)
