"""What the training of the chat model and of the reward models have in common."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: a short rise, then half a cosine down to nothing."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Optimiser:
    """Muon for the layers' matrices, where it learns far faster here, and AdamW for the rest.

    Parameters
    ----------
    model
        The whole model.
    layers
        The part of it whose matrices go to Muon.
    steps, warmup
        See `schedule`.
    matrix_rate, other_rate
        The highest learning rates of the two.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: torch.nn.Module,
        *,
        steps: int,
        warmup: int,
        matrix_rate: float,
        other_rate: float,
    ) -> None:
        matrices = [p for p in layers.parameters() if p.dim() == 2]
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        self.parameters = list(model.parameters())
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices, lr=matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(part, lambda step: schedule(step, steps, warmup))
            for part in self.parts
        ]

    def step(self, loss: torch.Tensor) -> None:
        """Move the weights one step down the slope of a loss."""
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, scheduler in zip(self.parts, self.schedulers, strict=True):
            part.step()
            part.zero_grad()
            scheduler.step()


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
