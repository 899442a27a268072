"""How what a classifier gives becomes one number per text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rewards.config import OutputConfig


class Readout:
    """Reads one number per text.

    Parameters
    ----------
    config : OutputConfig
    labels : mapping of int to str
        The model's labels (``config.id2label``).

    Raises
    ------
    ValueError
        When the model does not have the label or position asked for, or has several and none is
        chosen. Message without the model's name.
    """

    def __init__(self, config: OutputConfig, labels: Mapping[int, str]) -> None:
        self._config = config
        self._labels = {int(index): label for index, label in labels.items()}
        self._plus = 0
        self._minus: int | None = None
        if config.attribute is not None:
            return  # what it holds is seen when it is read
        if config.expect is not None:
            self._numbers = self._numbers_of(config.expect)
        elif config.margin is not None:
            self._plus = self._find(config.margin[0])
            self._minus = self._find(config.margin[1])
        elif config.label is not None:
            self._plus = self._find(config.label)
        elif config.index is not None:
            self._plus = self._find(config.index)
        elif len(self._labels) > 1:
            raise ValueError(
                f"it has the labels {self._known()}, and none is chosen; set output: {{label: ...}}"
                " or output: {margin: [wanted, unwanted]}"
            )
        if config.activation == "log_odds" and len(self._labels) == 1:
            raise ValueError(
                "it has one label, whose logit is the log-odds already; leave activation out"
            )

    def __call__(self, given: Any) -> Tensor:
        """Return one number per text, shape (n_texts,).

        Parameters
        ----------
        given : Tensor, shape (n_texts, n_labels), or transformers' output
            Logits, or what holds them; an attribute is read from the latter alone.
        """
        config = self._config
        if config.attribute is not None:
            scores = self._attribute(given, config.attribute)
        else:
            logits = given if isinstance(given, Tensor) else given.logits
            scores = self._logit(logits if logits.dtype == torch.float64 else logits.float())
        if config.activation == "sigmoid":
            scores = torch.sigmoid(scores)
        elif config.activation == "log_sigmoid":
            scores = torch.nn.functional.logsigmoid(scores)
        return config.sign * scores

    @property
    def position(self) -> int:
        """Where it reads, of a single label."""
        return self._plus

    def _logit(self, logits: Tensor) -> Tensor:
        config = self._config
        if config.expect is not None:
            numbers = torch.tensor(self._numbers, device=logits.device, dtype=logits.dtype)
            return torch.softmax(logits, dim=-1) @ numbers
        if config.activation == "log_odds":
            others = [index for index in range(logits.shape[1]) if index != self._plus]
            # log p - log(1 - p), without the p that would round to 1.
            return logits[:, self._plus] - torch.logsumexp(logits[:, others], dim=-1)
        if config.activation == "softmax":
            logits = torch.softmax(logits, dim=-1)
        scores = logits[:, self._plus]
        return scores if self._minus is None else scores - logits[:, self._minus]

    def _attribute(self, given: Any, name: str) -> Tensor:
        numbers = getattr(given, name, None)
        if not isinstance(numbers, Tensor):
            known = ", ".join(key for key in given if isinstance(given[key], Tensor))
            raise ValueError(f"its output has no numbers {name!r}; it has {known}")
        numbers = numbers.float().reshape(len(numbers), -1)
        n_numbers, index = numbers.shape[1], self._config.index
        if index is None and n_numbers > 1:
            raise ValueError(f"{name} holds {n_numbers} numbers, and none is chosen; set index")
        if index is not None and index >= n_numbers:
            raise ValueError(f"{name} holds {n_numbers} numbers; there is no index {index}")
        return numbers[:, index or 0]

    def _numbers_of(self, expect: Mapping[str, float]) -> list[float]:
        """Return the number of each label, in the model's order."""
        for label in expect:
            self._find(label)
        missing = [label for label in self._labels.values() if label not in expect]
        if missing:
            raise ValueError(f"expect has no number for {', '.join(missing)}; give every label one")
        return [expect[self._labels[index]] for index in sorted(self._labels)]

    def _find(self, label: str | int) -> int:
        if isinstance(label, int):
            if label in self._labels:
                return label
        else:
            for index, name in self._labels.items():
                if name == label:
                    return index
        raise ValueError(f"it has no label {label!r}; its labels are {self._known()}")

    def _known(self) -> str:
        return ", ".join(f"{index}: {name}" for index, name in sorted(self._labels.items()))
