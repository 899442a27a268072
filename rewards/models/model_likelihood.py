"""Log-likelihood of a text under a language model that is loaded for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from rewards.base import FloatArray, Rendered, Tokens
from rewards.config import LikelihoodConfig
from rewards.models.transformer import TransformerScorer

# Logits of a pass: 2^28 numbers are 1 GiB in float32.
_MAX_LOGITS = 1 << 28


class ModelLikelihood(TransformerScorer):
    """Mean (nats per token) or sum (nats) of the log-probabilities of a text's tokens.

    Each token is predicted from those before it, so the first one is not. A text of which no token
    counts has 0: nothing in it was unlikely.

    Notes
    -----
    With ``tokens: all`` and ``reduce: mean`` this is minus transformers' loss of a text, which is
    what MAP (arXiv 2410.19198) calls perplexity.
    """

    AUTO_CLASS = "AutoModelForCausalLM"
    LACKING = "Use a complete language model"

    _config: LikelihoodConfig

    @override
    def forward(self, batch: Sequence[Tokens]) -> FloatArray:
        longest = max(len(tokens) for tokens in batch)
        size = max(1, _MAX_LOGITS // (longest * self._n_logits))
        parts = [self._score(batch[at : at + size]) for at in range(0, len(batch), size)]
        return np.concatenate(parts)

    @override
    def _prepare_model(self, tokenizer: Any) -> None:
        self._n_logits = self._n_embeddings

    @override
    def _prepare_text(self, tokenizer: Any) -> None:
        self._view, self._encoder = self._read_view(
            tokenizer, self._config.input, mark=_MARKS[self._config.tokens]
        )

    def _score(self, batch: Sequence[Tokens]) -> FloatArray:
        with torch.inference_mode():
            inputs = self._tensors(batch, self._pad_id)
            logits = self._model(**inputs).logits
            scores = []
            for row, tokens in enumerate(batch):
                places = [place for place in tokens.marks if place > 0]
                if not places:
                    scores.append(0.0)
                    continue
                wanted = inputs["input_ids"][row, places]
                told = logits[row, [place - 1 for place in places]].float()
                chosen = told.gather(1, wanted[:, None])[:, 0]
                logprobs = (chosen - torch.logsumexp(told, dim=-1)).double()
                total = logprobs.sum().item()
                scores.append(total if self._config.reduce == "sum" else total / len(places))
        return np.array(scores, dtype=np.float64)


def _mark_all(rendered: Rendered, offsets: Sequence[tuple[int, int]]) -> Sequence[int]:
    return range(len(offsets))


def _mark_answer(rendered: Rendered, offsets: Sequence[tuple[int, int]]) -> Sequence[int]:
    # A token counts that holds any of the answer: its first one may start with a space before it.
    return [
        place
        for place, (start, end) in enumerate(offsets)
        if rendered.start < end and start < rendered.end
    ]


_MARKS = {"all": _mark_all, "answer": _mark_answer}
