"""One prompt read once, then many answers decoded in one batch. All torch of decoding is here.

The rows of a batch have equal length at every step, so nothing is padded or masked: what is
computed is the model's own forward pass, for every architecture whose cache can be repeated and
indexed by row. Rows that finish leave the batch.

A candidate's uniforms are bitwise its own. Its logits are so up to the rounding of matrix products,
which depends on the batch shape: about 1e-6 in float32, about 1e-2 in half precision. A token
changes with the batch only where its uniform falls that close to the border of two tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from server.backends.base import (
    BackendError,
    Candidate,
    FinishReason,
    SamplingSettings,
    TokenLogprob,
)
from server.backends.hf_sampling import Adjustment, UniformStreams, sample
from server.backends.hf_text import Detokenizer, StopFinder


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt as the model has read it.

    Attributes
    ----------
    cache : Cache
        Of one row.
    logits : tensor, shape (1, n_vocab), float32
        Of the first token of every answer.
    """

    cache: Cache
    logits: torch.Tensor


def read_prompt(model: Any, token_ids: Sequence[int], device: torch.device) -> Prefix:
    """Return the prompt's cache and next-token logits, from one forward pass."""
    ids = torch.tensor([list(token_ids)], device=device)
    options: dict[str, Any] = {"input_ids": ids, "use_cache": True, "return_dict": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # Otherwise the logits of every prompt token: 4,000 tokens x 150,000 ids is 2.4 GB.
        options["logits_to_keep"] = 1
    output = model(**options)
    cache = output.past_key_values
    if not isinstance(cache, Cache):
        raise BackendError(f"its cache is a {type(cache).__name__}, which cannot be repeated")
    return Prefix(cache, output.logits[:, -1].float())


@dataclass(slots=True)
class _Row:
    """An answer in progress."""

    index: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[Any]] = field(default_factory=list)
    stops: StopFinder | None = None


class Batch:
    """Some candidates of one request, decoded in lock-step.

    Parameters
    ----------
    model : Any
    detokenizer : Detokenizer
    eos_ids : frozenset of int
    prefix : Prefix
        Taken over: a prefix that is needed again must be copied first (`copy_prefix`).
    indices : sequence of int
        The candidates, one a row.
    sampling : SamplingSettings
        With `max_tokens` already cut to the context.
    seed : int
    top_logprobs : int
    prompt_ids : sequence of int
    """

    def __init__(
        self,
        model: Any,
        detokenizer: Detokenizer,
        eos_ids: frozenset[int],
        prefix: Prefix,
        indices: Sequence[int],
        sampling: SamplingSettings,
        seed: int,
        top_logprobs: int,
        prompt_ids: Sequence[int],
    ) -> None:
        device = prefix.logits.device
        self._model = model
        self._detokenizer = detokenizer
        self._eos_ids = eos_ids
        self._sampling = sampling
        self._top_logprobs = min(top_logprobs, prefix.logits.shape[-1])
        self._cache = prefix.cache
        self._cache.reorder_cache(torch.zeros(len(indices), dtype=torch.long, device=device))
        self._logits: torch.Tensor | None = prefix.logits.expand(len(indices), -1)
        self._tokens = torch.empty(0)
        self._uniforms = (
            UniformStreams(seed, indices, sampling.max_tokens, device)
            if sampling.temperature > 0
            else None
        )
        self._adjustment = (
            Adjustment(sampling, prompt_ids, len(indices), prefix.logits.shape[-1], device)
            if Adjustment.is_needed(sampling)
            else None
        )
        stop = tuple(text for text in sampling.stop if text)
        self._rows = [
            _Row(index, stops=StopFinder(detokenizer, stop) if stop else None) for index in indices
        ]

    def __len__(self) -> int:
        """Return the number of answers in progress."""
        return len(self._rows)

    def step(self) -> list[Candidate]:
        """Add one token to every row; return the answers that end with it.

        Raises
        ------
        BackendError
            When the model's log-probabilities are not numbers.
        """
        logits = self._logits
        if logits is None:
            output = self._model(
                input_ids=self._tokens.unsqueeze(-1),
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
            )
            logits = output.logits[:, -1].float()
        self._logits = None
        uniforms = None if self._uniforms is None else self._uniforms.draw()
        tokens, log_partition = sample(logits, uniforms, self._sampling, self._adjustment)
        if self._adjustment is not None:
            self._adjustment.count(tokens)
        logprobs = (logits.gather(-1, tokens.unsqueeze(-1)) - log_partition).squeeze(-1).tolist()
        # NaN anywhere in a row's logits makes its log-partition, and so this sum, NaN.
        if sum(logprobs) != sum(logprobs):
            raise BackendError("the model's log-probabilities are not numbers (NaN)")
        if self._top_logprobs:
            values, ids = logits.topk(self._top_logprobs, dim=-1)
            values = values - log_partition
            for row, *top in zip(self._rows, ids.tolist(), values.tolist(), strict=True):
                row.top.append(top)
        finished = []
        kept = []
        for i, (row, token, logprob) in enumerate(
            zip(self._rows, tokens.tolist(), logprobs, strict=True)
        ):
            candidate = self._extend(row, token, logprob)
            if candidate is None:
                kept.append(i)
            else:
                finished.append(candidate)
        self._tokens = tokens
        if finished:
            self._keep(kept)
        return finished

    def _extend(self, row: _Row, token: int, logprob: float) -> Candidate | None:
        """Add a token to a row; return its answer when that ends it."""
        if token in self._eos_ids:
            return self._finish(row, "stop", n_tokens=len(row.ids) + 1)
        row.ids.append(token)
        row.logprobs.append(logprob)
        if row.stops is not None:
            text = row.stops.push(token)
            if text is not None:
                return self._finish(row, "stop", n_tokens=len(row.ids), text=text)
        if len(row.ids) == self._sampling.max_tokens:
            return self._finish(row, "length", n_tokens=len(row.ids))
        return None

    def _finish(
        self, row: _Row, reason: FinishReason, *, n_tokens: int, text: str | None = None
    ) -> Candidate:
        n_shown = len(row.ids)
        if text is None:
            text = self._detokenizer.text(row.ids)
        elif row.stops is not None:
            n_shown = row.stops.n_tokens_of(text)
        name = self._detokenizer.token
        tokens = tuple(
            TokenLogprob(
                name(row.ids[i]),
                row.logprobs[i],
                tuple((name(t), value) for t, value in zip(*row.top[i], strict=True))
                if row.top
                else (),
            )
            for i in range(n_shown)
        )
        return Candidate(
            row.index, text, tokens, n_tokens, reason, token_ids=tuple(row.ids[:n_shown])
        )

    def _keep(self, kept: list[int]) -> None:
        self._rows = [self._rows[i] for i in kept]
        if not kept:
            return
        index = torch.tensor(kept, device=self._tokens.device)
        self._tokens = self._tokens[index]
        self._cache.reorder_cache(index)
        if self._uniforms is not None:
            self._uniforms.keep(kept)
        if self._adjustment is not None:
            self._adjustment.keep(index)


def copy_prefix(prefix: Prefix) -> Prefix:
    """Return a prefix that a `Batch` may take while the first stays usable."""
    return Prefix(copy.deepcopy(prefix.cache), prefix.logits)


@torch.inference_mode()
def check_decoding(model: Any, device: torch.device) -> None:
    """Compare decoding from a repeated cache with reading the same tokens at once.

    Raises
    ------
    BackendError
        When they differ: the architecture keeps state that this way of decoding does not carry.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [(7 * i + 3) % vocabulary for i in range(6)]
    prefix = read_prompt(model, ids[:-2], device)
    cache = prefix.cache
    cache.reorder_cache(torch.zeros(3, dtype=torch.long, device=device))
    for n_rows, token in ((3, ids[-2]), (2, ids[-1])):
        cache.reorder_cache(torch.arange(n_rows, device=device))
        tokens = torch.full((n_rows, 1), token, device=device)
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, return_dict=True)
        decoded = output.logits[:, -1].float().log_softmax(dim=-1)
    expected = read_prompt(model, ids, device).logits.log_softmax(dim=-1)
    # Rounding only; a lost state is off by whole nats. Half precision rounds coarsely.
    tolerance = 1e-3 if output.logits.dtype == torch.float32 else 0.5
    difference = (decoded.exp() - expected.exp()).abs().sum(dim=-1).max().item()
    if not difference <= tolerance:
        raise BackendError(
            f"decoding step by step differs from reading at once by {difference:.2g} in probability"
        )
