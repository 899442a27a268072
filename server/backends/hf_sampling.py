"""Logits to tokens: temperature, min-p, top-k, top-p, an inverse-CDF draw from keyed uniforms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from server.backends.base import SamplingSettings

# Uniforms drawn ahead for each candidate; a draw of one is mostly overhead.
_UNIFORM_BLOCK = 64
# The inverse CDF is searched in blocks of this many tokens, then inside the block found.
_CDF_BLOCK = 256
# A nucleus is looked for among this many likeliest tokens before the vocabulary is sorted, which
# takes 20 times as long as the second of them (32 rows, 150,000 tokens, one core).
_NUCLEUS_GUESSES = (256, 1024)


class UniformStreams:
    """One uniform in [0, 1) for each row and step, from Philox keyed by (seed, candidate).

    A counter-based generator: what a candidate draws depends on its key alone, bit for bit, not on
    which candidates share its batch or when it leaves.

    Parameters
    ----------
    seed : int
    indices : sequence of int
        The candidates, one a row.
    n_steps : int
        Draws each row may take at most.
    device : torch.device
    """

    def __init__(
        self, seed: int, indices: Sequence[int], n_steps: int, device: torch.device
    ) -> None:
        self._streams = [
            np.random.Generator(np.random.Philox(key=np.array([seed, i], dtype=np.uint64)))
            for i in indices
        ]
        self._block = min(n_steps, _UNIFORM_BLOCK)
        self._device = device
        self._next = self._block
        self._uniforms = torch.empty(0)

    def draw(self) -> torch.Tensor:
        """Return the next uniform of every row, shape (n_rows, 1), float64."""
        if self._next == self._block:
            block = np.stack([stream.random(self._block) for stream in self._streams])
            self._uniforms = torch.from_numpy(block).to(self._device)
            self._next = 0
        column = self._uniforms[:, self._next : self._next + 1]
        self._next += 1
        return column

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._streams = [self._streams[row] for row in rows]
        if self._next < self._block:
            self._uniforms = self._uniforms[list(rows)]


class Adjustment:
    """Biases and penalties of one request, and the tokens that its answers have so far.

    Parameters
    ----------
    sampling : SamplingSettings
    prompt_ids : sequence of int
    n_rows, n_vocab : int
    device : torch.device

    Notes
    -----
    vLLM's definitions, in its order: biases are added; the repetition penalty divides positive and
    multiplies negative logits of tokens in prompt and answer; the other two are subtracted for
    tokens in the answer, once an occurrence (frequency) and once (presence).
    """

    def __init__(
        self,
        sampling: SamplingSettings,
        prompt_ids: Sequence[int],
        n_rows: int,
        n_vocab: int,
        device: torch.device,
    ) -> None:
        self._frequency = sampling.frequency_penalty
        self._presence = sampling.presence_penalty
        self._repetition = sampling.repetition_penalty
        self._bias = torch.zeros(n_vocab, device=device)
        for token, bias in sampling.logit_bias:
            self._bias[token] = bias
        self._is_in_prompt = torch.zeros(n_vocab, dtype=torch.bool, device=device)
        self._is_in_prompt[torch.tensor(list(prompt_ids), dtype=torch.long, device=device)] = True
        self._counts = torch.zeros(n_rows, n_vocab, device=device)

    @staticmethod
    def is_needed(sampling: SamplingSettings) -> bool:
        """Return whether the settings change any logit."""
        return bool(
            sampling.logit_bias
            or sampling.frequency_penalty
            or sampling.presence_penalty
            or sampling.repetition_penalty != 1.0
        )

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits to draw from, shape (n_rows, n_vocab)."""
        logits = logits + self._bias
        is_seen = self._counts > 0
        if self._repetition != 1.0:
            penalised = torch.where(
                logits > 0, logits / self._repetition, logits * self._repetition
            )
            logits = torch.where(is_seen | self._is_in_prompt, penalised, logits)
        return logits - self._frequency * self._counts - self._presence * is_seen

    def count(self, tokens: torch.Tensor) -> None:
        """Take in the token that each row got, shape (n_rows,)."""
        self._counts.scatter_add_(
            -1, tokens.unsqueeze(-1), torch.ones_like(tokens.unsqueeze(-1), dtype=torch.float32)
        )

    def keep(self, index: torch.Tensor) -> None:
        """Go on with these rows only."""
        self._counts = self._counts[index]


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor | None,
    sampling: SamplingSettings,
    adjustment: Adjustment | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one token for each row, and the log-partition of its logits.

    Parameters
    ----------
    logits : tensor, shape (n_rows, n_vocab), float32
    uniforms : tensor, shape (n_rows, 1), float64, or None
        Needed unless the temperature is 0.
    sampling : SamplingSettings
        Temperature first, then min-p, then top-k, then top-p on what these left: vLLM's order.
    adjustment : Adjustment, optional
        Of the logits, before all that.

    Returns
    -------
    tokens : tensor, shape (n_rows,)
    log_partition : tensor, shape (n_rows, 1)
        Before any of the settings; logits minus this are the model's own log-probabilities.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    weights = (logits - largest).exp_()
    log_partition = weights.sum(dim=-1, keepdim=True).log_().add_(largest)
    if adjustment is not None:
        logits = adjustment(logits)
        largest = logits.amax(dim=-1, keepdim=True)
        weights = (logits - largest).exp_()
    if sampling.temperature == 0.0 or uniforms is None:
        return logits.argmax(dim=-1), log_partition
    ids = None
    if 0 < sampling.top_k < logits.shape[-1]:
        likeliest, ids = logits.topk(sampling.top_k, dim=-1)
        weights = ((likeliest - largest) / sampling.temperature).exp_()
    elif sampling.temperature != 1.0:
        weights = ((logits - largest) / sampling.temperature).exp_()
    if sampling.min_p > 0.0:
        # The likeliest token has weight 1.
        weights = weights.masked_fill(weights < sampling.min_p, 0.0)
    if sampling.top_p < 1.0:
        limit = sampling.top_p * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
        if ids is None:
            weights, ids = _descending(weights, limit)
        # The smallest prefix whose mass reaches the limit; its first token always stays.
        before = weights.cumsum(dim=-1, dtype=torch.float64) - weights
        weights = weights.masked_fill(before >= limit, 0.0)
    places = _invert_cdf(weights, uniforms)
    return (places if ids is None else ids.gather(-1, places)).squeeze(-1), log_partition


def _descending(weights: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest weights in order, at least as many as reach `mass`, and their places."""
    for n_likeliest in _NUCLEUS_GUESSES:
        if n_likeliest < weights.shape[-1]:
            guess, ids = weights.topk(n_likeliest, dim=-1)
            if bool((guess.sum(dim=-1, keepdim=True, dtype=torch.float64) >= mass).all()):
                return guess, ids
    return weights.sort(dim=-1, descending=True)


def _invert_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the index j of each row with cdf[j-1] <= u < cdf[j], shape (n_rows, 1).

    Summed in float64: a float32 cumulative sum near 1 moves in steps of 6e-8, so the tokens of
    a large vocabulary's tail could not be told apart. First the block is found, then the place in
    it, so that only sums of blocks are accumulated over the whole vocabulary.

    Parameters
    ----------
    weights : tensor, shape (n_rows, n), not negative, any positive sum
    uniforms : tensor, shape (n_rows, 1), float64
    """
    n = weights.shape[-1]
    if n <= _CDF_BLOCK:
        return _search(weights, uniforms)[0]
    if n % _CDF_BLOCK:
        weights = torch.nn.functional.pad(weights, (0, _CDF_BLOCK - n % _CDF_BLOCK))
    blocks = weights.view(weights.shape[0], -1, _CDF_BLOCK)
    block, rest = _search(blocks.sum(dim=-1), uniforms)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, _CDF_BLOCK)).squeeze(1)
    index = block * _CDF_BLOCK + _search(inside, rest)[0]
    # NaN is found by whoever looks at the log-probabilities; an index beyond the vocabulary would
    # end a GPU's context before that.
    return index.clamp_(max=n - 1)


def _search(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index for each uniform, and where in (0, 1) of that index's weight it falls."""
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    target = uniforms * cdf[:, -1:]
    # `right` skips entries without weight; the minimum is for a product that rounds up to the sum.
    index = torch.searchsorted(cdf, target, right=True).clamp_(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, index).double()
    rest = ((target - (cdf.gather(-1, index) - weight)) / weight).clamp_(0.0, 1.0)
    return index, rest
