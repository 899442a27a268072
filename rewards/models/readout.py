"""How logits become one number per text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rewards.config import OutputConfig


class Readout:
    """Reads one number per row of logits.

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
        self._minus: int | None = None
        if config.margin is not None:
            self._plus = self._find(config.margin[0])
            self._minus = self._find(config.margin[1])
        elif config.label is not None:
            self._plus = self._find(config.label)
        elif config.index is not None:
            self._plus = self._find(config.index)
        elif len(self._labels) == 1:
            self._plus = 0
        else:
            raise ValueError(
                f"it has the labels {self._known()}, and none is chosen; set output: {{label: ...}}"
                " or output: {margin: [wanted, unwanted]}"
            )

    def __call__(self, logits: Tensor) -> Tensor:
        """Return one number per row of logits, shape (n_texts,)."""
        activation = self._config.activation
        if activation == "softmax":
            logits = torch.softmax(logits, dim=-1)
        scores = logits[:, self._plus]
        if self._minus is not None:
            scores = scores - logits[:, self._minus]
        if activation == "sigmoid":
            scores = torch.sigmoid(scores)
        elif activation == "log_sigmoid":
            scores = torch.nn.functional.logsigmoid(scores)
        return self._config.sign * scores

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
