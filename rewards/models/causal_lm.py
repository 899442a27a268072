"""Reward models that are language models: the logit of one token behind the input is the reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from rewards.base import FloatArray, Tokens
from rewards.config import CausalLmConfig, ChatInput, Token
from rewards.models.transformer import TransformerScorer, in_float32


class CausalLm(TransformerScorer):
    """A language model read at the token that it would write next.

    The logit of a token, or the log-odds of two. Their rows of the output layer alone are computed,
    so that a vocabulary of 150,000 costs nothing.
    """

    AUTO_CLASS = "AutoModelForCausalLM"
    LACKING = "Use a complete language model"

    _config: CausalLmConfig

    @override
    def forward(self, batch: Sequence[Tokens]) -> FloatArray:
        with torch.inference_mode():
            logits = self._model(**self._tensors(batch, self._pad_id)).logits
            last = [len(tokens) - 1 for tokens in batch]
            rows = logits[range(len(batch)), last].float()
            sides = [torch.logsumexp(rows[:, places], dim=-1) for places in self._sides]
            scores = sides[0] if len(sides) == 1 else sides[0] - sides[1]
            return np.asarray((self._config.output.sign * scores).cpu().numpy(), dtype=np.float64)

    @override
    def _prepare_model(self, tokenizer: Any) -> None:
        sides = [
            [find_token(tokenizer, token, self._n_embeddings) for token in spellings]
            for spellings in self._config.output.sides
        ]
        if len(sides) == 2 and (both := set(sides[0]) & set(sides[1])):
            names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(both)))
            raise ValueError(f"both sides of the margin hold the token {names}; take it off one")
        # A spelling that is the same token must not count twice.
        ids = list(dict.fromkeys(token for side in sides for token in side))
        self._sides = [sorted({ids.index(token) for token in side}) for side in sides]
        keep_rows(self._model, ids)

    @override
    def _prepare_text(self, tokenizer: Any) -> None:
        config = self._config
        self._view, self._encoder = self._read_view(tokenizer, config.input, prefill=config.prefill)

    @override
    def _check_reading(self, tokenizer: Any, inputs: Sequence[Tokens], rtol: float) -> None:
        if isinstance(self._config.input, ChatInput):
            return
        end = tokenizer.eos_token_id
        if end is not None and any(tokens.ids[-1] == end for tokens in inputs):
            raise ValueError(
                "its tokenizer ends every text with the end token, behind which a language model "
                "has nothing to say; use a tokenizer that does not"
            )


def find_token(tokenizer: Any, token: Token, n_embeddings: int) -> int:
    """Return the number of a token in the vocabulary.

    Raises
    ------
    ValueError
        When the text is not one token, or the model does not know it.
    """
    if isinstance(token, str):
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            known: int | None = tokenizer.get_vocab().get(token)
            if known is None:
                parts = tokenizer.convert_ids_to_tokens(ids)
                raise ValueError(
                    f"{token!r} is not one token of its tokenizer but {len(ids)} ({parts}); name "
                    "one, the first where it tells enough"
                )
            ids = [known]
        found = int(ids[0])
        if found == tokenizer.unk_token_id:
            raise ValueError(f"its tokenizer does not know {token!r}")
    else:
        found = token
    if found >= n_embeddings:
        raise ValueError(f"token {found} is beyond the {n_embeddings} that the model knows")
    return found


def keep_rows(model: Any, ids: Sequence[int]) -> None:
    """Cut a language model's output layer down to a few tokens; its logits are then of those.

    What the model does to its logits besides (a cap, a scale) is done to these too.

    Raises
    ------
    ValueError
        When its output layer is not linear.
    """
    full = model.get_output_embeddings()
    if not isinstance(full, nn.Linear):
        raise ValueError("its output layer is not linear; it cannot be read at single tokens")
    head = nn.Linear(full.in_features, len(ids), bias=full.bias is not None)
    with torch.no_grad():
        head.weight = _rows(full.weight, ids)
        if full.bias is not None:
            head.bias = _rows(full.bias, ids)
    model.set_output_embeddings(in_float32(head))


def _rows(weight: Tensor, ids: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(weight[list(ids)].clone(), requires_grad=False)
