"""How near two texts are in the space of an embedding model, such as a prompt and its answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from rewards.base import FloatArray, Rendered, Tokens
from rewards.config import EmbeddingConfig, PairInput, TextInput
from rewards.models.transformer import TransformerScorer

# First texts whose vectors are remembered: all answers to one prompt share it. 3 MB at 768 numbers.
_REMEMBERED = 1024


class EmbeddingScorer(TransformerScorer):
    """Cosine, in [-1, 1], of the embeddings of two texts; 0 for a vector of length 0."""

    AUTO_CLASS = "AutoModel"
    LACKING = "Use a complete encoder, or another pooling"

    _config: EmbeddingConfig

    @override
    def encode(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        texts = list(dict.fromkeys(item.first or "" for item in rendered))
        firsts = super().encode([Rendered(text, 0, len(text)) for text in texts])
        first_of = {text: tuple(tokens.ids) for text, tokens in zip(texts, firsts, strict=True)}
        seconds = super().encode([Rendered(item.text, item.start, item.end) for item in rendered])
        return [
            Tokens(second.ids, second.type_ids, first=first_of[item.first or ""])
            for second, item in zip(seconds, rendered, strict=True)
        ]

    @override
    def forward(self, batch: Sequence[Tokens]) -> FloatArray:
        with torch.inference_mode():
            budget = max(self.max_length, len(batch) * max(len(tokens) for tokens in batch))
            # Inputs that only serve to time a pass have no first text.
            texts = [tokens.first or tuple(tokens.ids) for tokens in batch]
            firsts = self._embed_firsts(texts, budget)
            seconds = self._embed(batch)
            cosines = torch.nn.functional.cosine_similarity(firsts, seconds, dim=-1)
            return np.asarray(cosines.cpu().numpy(), dtype=np.float64)

    @override
    def _prepare_model(self, tokenizer: Any) -> None:
        self._known: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    @override
    def _prepare_text(self, tokenizer: Any) -> None:
        config = self._config
        pair = PairInput(view="pair", a=config.a, b=config.b, strip=config.strip)
        self._view, _ = self._read_view(tokenizer, pair)
        # Each text is read apart, as a single one.
        _, self._encoder = self._read_view(tokenizer, TextInput(view="text"))

    @override
    def _does_without(self, weight: str) -> bool:
        return self._config.pooling != "pooler" and weight.startswith("pooler.")

    def _embed_firsts(self, texts: Sequence[tuple[int, ...]], budget: int) -> Tensor:
        """Return the vectors of first texts, shape (n, size); those known are not computed.

        The budget bounds a pass, in padded tokens.
        """
        vectors = {text: self._known[text] for text in set(texts) if text in self._known}
        new = sorted(set(texts) - set(vectors), key=len, reverse=True)
        while new:
            n = max(1, budget // len(new[0]))
            group, new = new[:n], new[n:]
            found = self._embed([Tokens(list(text), [0] * len(text)) for text in group])
            vectors.update(zip(group, found.unbind(), strict=True))
        for text in texts:
            self._known[text] = vectors[text]
            self._known.move_to_end(text)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return torch.stack([vectors[text] for text in texts])

    def _embed(self, batch: Sequence[Tokens]) -> Tensor:
        """Return the vectors of texts, shape (n, size), in float32."""
        inputs = self._tensors(batch, self._pad_id)
        given = self._model(**inputs)
        if self._config.pooling == "pooler":
            pooled = getattr(given, "pooler_output", None)
            if pooled is None:
                raise ValueError("it gives no pooler_output; set another pooling")
            return torch.as_tensor(pooled).float()
        states = given.last_hidden_state.float()
        if self._config.pooling == "cls":
            return torch.as_tensor(states[:, 0])
        if self._config.pooling == "last":
            return torch.as_tensor(states[range(len(batch)), [len(one) - 1 for one in batch]])
        mask = inputs["attention_mask"][:, :, None]
        return torch.as_tensor((states * mask).sum(dim=1) / mask.sum(dim=1))
