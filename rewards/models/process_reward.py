"""Process reward models: a score at the end of each step, and one number from all of them."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from typing_extensions import override

from rewards.base import FloatArray, Message, Rendered, Sample, Tokens
from rewards.config import OutputConfig, ProcessRewardConfig
from rewards.errors import ScoringError
from rewards.models.causal_lm import find_token, keep_rows
from rewards.models.readout import Readout
from rewards.models.transformer import TransformerScorer, in_float32

_REDUCE: dict[str, Callable[[FloatArray], float]] = {
    "min": lambda steps: float(steps.min()),
    "mean": lambda steps: float(steps.mean()),
    "prod": lambda steps: float(steps.prod()),
    "last": lambda steps: float(steps[-1]),
}


class ProcessReward(TransformerScorer):
    """A token classifier (or language model) read behind each step of an answer.

    The probability of "good" at each step, in [0, 1], becomes their minimum, mean, product, or the
    last one. Of an answer that is too long, the end is cut off, and its steps are not scored; the
    last score is then that of all that is left.
    """

    AUTO_CLASS = "AutoModelForTokenClassification"
    LACKING = "Use a model trained as a process reward model"

    _config: ProcessRewardConfig

    @override
    def render(self, sample: Sample) -> Rendered:
        # A separator of the sampler's own would be read as the end of a step.
        separator = self._config.separator
        parts = sample.answer.split(self._config.split)
        steps = [step for part in parts if (step := part.replace(separator, "").strip())]
        messages = tuple(
            Message(role=message["role"], content=message["content"].replace(separator, ""))
            for message in sample.messages
        )
        answer = "".join(f"{step}{separator}" for step in steps or [""])
        shown = self._view.render(dataclasses.replace(sample, messages=messages, answer=answer))
        if not shown.text[: shown.end].endswith(separator):
            return shown
        # Truncation leaves what stands behind the answer: so the end of the last step is read.
        return dataclasses.replace(shown, end=shown.end - len(separator))

    @override
    def encode(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        inputs = super().encode(rendered)
        if any(not tokens.marks for tokens in inputs):
            problem = (
                "no end of a step is found; set a separator that the chat template leaves where "
                "it is, or raise max_length"
            )
            raise ScoringError(self.name, self.values, problem)
        return inputs

    @override
    def forward(self, batch: Sequence[Tokens]) -> FloatArray:
        with torch.inference_mode():
            given = self._model(**self._tensors(batch, self._pad_id))
            logits = getattr(given, "logits", None)
            # Models with code of their own give it as the first of a tuple.
            logits = (given[0] if logits is None else logits).float()
            if logits.shape[-1] == 1:
                good = torch.sigmoid(logits[..., 0])
            else:
                good = torch.softmax(logits, dim=-1)[..., self._good]
            # Inputs that only serve to time a pass have no marks.
            steps = [
                good[row, list(tokens.marks) or [-1]].double().cpu().numpy()
                for row, tokens in enumerate(batch)
            ]
        reduce = _REDUCE[self._config.aggregate]
        return np.array([reduce(one) for one in steps], dtype=np.float64)

    @override
    def _auto_class(self, options: dict[str, Any]) -> str:
        if self._config.tokens is not None:
            return "AutoModelForCausalLM"
        config = transformers.AutoConfig.from_pretrained(self._source, **options)
        code = getattr(config, "auto_map", None) or {}
        is_own = "AutoModel" in code and self.AUTO_CLASS not in code
        return "AutoModel" if is_own else self.AUTO_CLASS

    @override
    def _prepare_model(self, tokenizer: Any) -> None:
        tokens, label = self._config.tokens, self._config.label
        self._good = 0
        if tokens is not None:
            ids = [find_token(tokenizer, token, self._n_embeddings) for token in tokens]
            if ids[0] == ids[1]:
                raise ValueError(f"good and bad are the same token, {tokens[0]!r}; correct tokens")
            keep_rows(self._model, ids)
            return
        if isinstance(getattr(self._model, "score", None), torch.nn.Linear):
            in_float32(self._model.score)
        labels = self._model.config.id2label
        if label is None and len(labels) > 1:
            known = ", ".join(f"{index}: {name}" for index, name in labels.items())
            raise ValueError(f"it has the labels {known}; set label to that of a good step")
        if isinstance(label, str):
            self._good = Readout(OutputConfig(label=label), labels).position
        else:
            self._good = Readout(OutputConfig(index=label or 0), labels).position

    @override
    def _prepare_text(self, tokenizer: Any) -> None:
        self._view, self._encoder = self._read_view(tokenizer, self._config.input, mark=self._mark)

    @override
    def _check_reading(self, tokenizer: Any, inputs: Sequence[Tokens], rtol: float) -> None:
        last = self._config.separator[-1]
        for tokens in inputs:
            read = tokenizer.decode([tokens.ids[tokens.marks[-1]]])
            if last not in read:
                raise ValueError(
                    f"its tokenizer does not tell where the separator {self._config.separator!r} "
                    "stands; set the separator that it was trained with, a token of its own"
                )

    def _mark(self, rendered: Rendered, offsets: Sequence[tuple[int, int]]) -> list[int]:
        """Return the places of the tokens that end the steps."""
        separator = self._config.separator
        answer = rendered.text[rendered.start : rendered.end + len(separator)]
        places = [place for place, (start, _) in enumerate(offsets) if start >= 0]
        starts = [offsets[place][0] for place in places]
        marks, at = [], answer.find(separator)
        while at >= 0:
            end = rendered.start + at + len(separator)
            # The last token that starts before the separator's end holds its last character.
            marks.append(places[bisect_left(starts, end) - 1])
            at = answer.find(separator, at + len(separator))
        return marks
