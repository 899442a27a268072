"""Reward models that are transformers sequence classifiers, encoders and causal ones alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from rewards.base import FloatArray, Sample, Tokens
from rewards.config import ChatInput, OutputConfig, PairInput, SequenceClassifierConfig, TextInput
from rewards.models.readout import Readout
from rewards.models.self_test import check_end
from rewards.models.transformer import TransformerScorer, in_float32


class SequenceClassifier(TransformerScorer):
    """One transformers sequence classifier, and one or several ways to read its logits."""

    AUTO_CLASS = "AutoModelForSequenceClassification"
    LACKING = (
        "A plain language model or encoder has no reward head; use a model trained as a sequence "
        "classifier"
    )

    _config: SequenceClassifierConfig

    @override
    def identity(self, output: str) -> dict[str, object]:
        settings = self._config.model_dump(include={"kind", "dtype", "input"})
        settings["output"] = self._config.reads[output].model_dump()
        return {**settings, "max_length": self.max_length, "weights": self._weights}

    @override
    def forward(self, batch: Sequence[Tokens]) -> FloatArray:
        return self._read(batch, self._readouts)

    @override
    def alternatives(self, samples: Sequence[Sample]) -> dict[str, FloatArray]:
        found: dict[str, FloatArray] = {}
        inputs = self.encode([self.render(sample) for sample in samples])
        labels: dict[int, str] = self._model.config.id2label
        for index, label in labels.items() if len(labels) > 1 else ():
            read = Readout(OutputConfig(index=int(index)), labels)
            found[f"output: {{label: {label}}}"] = self._one_by_one(inputs, [read])[:, 0]
        for view in (ChatInput(view="chat"), PairInput(view="pair"), TextInput(view="text")):
            if view.view == self._config.input.view or (
                view.view == "chat" and not self._tokenizer.chat_template
            ):
                continue
            other, encoder = self._read_view(self._tokenizer, view)
            shown = encoder([other.render(sample) for sample in samples])
            found[f"input: {{view: {view.view}}}"] = self._one_by_one(shown, self._readouts[:1])[
                :, 0
            ]
        return found

    @override
    def _prepare_model(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        head = getattr(self._model, "score", None)
        # Causal classifiers find the token to read by searching for padding; see _choose_pad_id.
        self._searches_padding = isinstance(head, nn.Linear)
        if isinstance(head, nn.Linear):
            in_float32(head)
        if not self._has_pad_id and not self._searches_padding:
            raise ValueError("neither tokenizer nor config.json names a padding token; add one")
        labels = self._model.config.id2label
        self._readouts = [Readout(output, labels) for output in self._config.reads.values()]

    @override
    def _prepare_text(self, tokenizer: Any) -> None:
        self._view, self._encoder = self._read_view(tokenizer, self._config.input)

    @override
    def _check_reading(self, tokenizer: Any, inputs: Sequence[Tokens], rtol: float) -> None:
        if not self._searches_padding:
            check_end(self, inputs, self._read_with_pad_id, self._n_embeddings, rtol)

    def _read(self, batch: Sequence[Tokens], readouts: Sequence[Readout]) -> FloatArray:
        """Return what the readouts read, shape (n_inputs, n_readouts)."""
        with torch.inference_mode():
            given = self._model(**self._tensors(batch, self._choose_pad_id(batch)))
            scores = torch.stack([read(given) for read in readouts], dim=1)
            return np.asarray(scores.cpu().numpy(), dtype=np.float64)

    def _one_by_one(self, inputs: Sequence[Tokens], readouts: Sequence[Readout]) -> FloatArray:
        return np.concatenate([self._read([tokens], readouts) for tokens in inputs])

    def _read_with_pad_id(self, tokens: Tokens, pad_id: int) -> FloatArray:
        """Return the outputs of one input when the model is told another padding token."""
        configs = (self._model.config, self._model.config.get_text_config())
        before = [config.pad_token_id for config in configs]
        for config in configs:
            config.pad_token_id = pad_id
        try:
            return self._read([tokens], self._readouts)
        finally:
            for config, old in zip(configs, before, strict=True):
                config.pad_token_id = old

    def _choose_pad_id(self, batch: Sequence[Tokens]) -> int:
        """Return the id to pad this batch with.

        Causal classifiers read the last token that is not ``config.pad_token_id``. Where padding
        is also the end token they skip the real end, and score another position without a
        warning; where none is set they refuse batches. So padding is, per batch, an id that ends
        no input of it: then the search finds the last real token.
        """
        if not self._searches_padding:
            return self._pad_id
        last = {tokens.ids[-1] for tokens in batch}
        candidates = (self._pad_id, *range(len(last) + 1))
        pad_id: int = next(candidate for candidate in candidates if candidate not in last)
        self._model.config.pad_token_id = pad_id
        self._model.config.get_text_config().pad_token_id = pad_id
        return pad_id
