"""Reward models in a vLLM engine of their own: candidates of a prompt share its prefill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from typing_extensions import override

from rewards.base import TRIAL, DirectScorer, FloatArray, Message, Sample
from rewards.config import ChatInput, VllmPoolingConfig
from rewards.errors import RewardModelError, ScoringError
from rewards.hub import why_missing
from rewards.identity import hash_folder
from rewards.models.encoding import Encoder
from rewards.models.readout import Readout
from rewards.models.views import make_view
from rewards.models.vllm_child import ChildError, VllmChild

_QUESTION = Message(role="user", content="What is the capital of France?")
_ANSWERS = ("Paris.", "I do not know, and I would rather talk about something else.")


class VllmPoolingScorer(DirectScorer):
    """One sequence classifier served by vLLM, and one or several ways to read its logits.

    Parameters
    ----------
    name, values
        As for every scorer.
    config : VllmPoolingConfig
    source : Path or str
        Model folder, or hub name.

    Notes
    -----
    Inputs are tokenised and shortened here, as those of `SequenceClassifier`, and sent as token
    ids: both kinds read the same tokens of the same sample.
    """

    def __init__(
        self, name: str, values: Sequence[str], config: VllmPoolingConfig, source: Path | str
    ) -> None:
        super().__init__(name, values)
        self.outputs = config.output_names
        self.n_threads = config.max_concurrent
        self.patience_s = config.timeout_s
        self._config = config
        self._source = source
        self._weights = ""
        self._child: VllmChild | None = None

    @override
    def identity(self, output: str) -> dict[str, object]:
        settings = self._config.model_dump(include={"kind", "dtype", "input", "max_length"})
        settings["output"] = self._config.reads[output].model_dump()
        return {**settings, "weights": self._weights}

    @override
    def trial(self) -> Sample:
        return TRIAL

    @override
    def load(self, device: str) -> None:
        config = self._config
        self._weights = (
            hash_folder(self._source)
            if isinstance(self._source, Path)
            else f"{self._source}@{config.revision}"
        )
        try:
            self._prepare_text()
            self._child = VllmChild(
                _arguments(config, str(self._source), is_cpu=not torch.cuda.is_available()),
                start_timeout_s=config.start_timeout_s,
                n_connections=config.max_concurrent,
            )
            self._child.start()
            self._score([Sample((_QUESTION,), answer) for answer in _ANSWERS])
        except ChildError as error:
            self.close()
            raise self._error(str(error)) from None
        except (OSError, ValueError) as error:
            self.close()
            problem = why_missing(error) or f"it cannot be loaded ({type(error).__name__}: {error})"
            raise self._error(problem) from error

    @override
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        try:
            return self._score(samples)
        except ChildError as error:
            raise ScoringError(self.name, self.values, str(error)) from None

    @override
    def close(self) -> None:
        if self._child is not None:
            self._child.close()

    def _score(self, samples: Sequence[Sample]) -> FloatArray:
        assert self._child is not None  # loaded
        tokens = self._encoder([self._view.render(sample) for sample in samples])
        body = {"input": [one.ids for one in tokens], "use_activation": False}
        reply = self._child.post("/classify", body, self._config.timeout_s)
        rows = sorted(reply["data"], key=lambda row: int(row["index"]))
        logits = torch.tensor([row["probs"] for row in rows], dtype=torch.float64)
        if not torch.isfinite(logits).all():
            raise ChildError("it gave a number that is not finite; check its weights and dtype")
        scores = torch.stack([read(logits) for read in self._readouts], dim=1)
        return np.asarray(scores.numpy(), dtype=np.float64)

    def _prepare_text(self) -> None:
        """Load the tokenizer and what the labels are called."""
        config = self._config
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if isinstance(self._source, Path):
            options["local_files_only"] = True
        elif config.revision is not None:
            options["revision"] = config.revision
        tokenizer = transformers.AutoTokenizer.from_pretrained(self._source, **options)
        model = transformers.AutoConfig.from_pretrained(self._source, **options)
        if not tokenizer.is_fast:
            raise ValueError("its tokenizer has no fast version; save it with a tokenizer.json")
        self._readouts = [Readout(output, model.id2label) for output in config.reads.values()]
        self._view = make_view(config.input, tokenizer)
        specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        self._encoder = Encoder(
            tokenizer.backend_tokenizer,
            config.max_length,
            adds_special_tokens=not isinstance(config.input, ChatInput),
            start_id=tokenizer.bos_token_id,
            empty_id=next(token for token in specials if token is not None),
        )

    def _error(self, problem: str) -> RewardModelError:
        return RewardModelError(self.name, self.values, str(self._source), problem)


def _arguments(config: VllmPoolingConfig, model: str, *, is_cpu: bool) -> list[str]:
    """Return vLLM's command line."""
    # float32 is what a CPU computes well in, and what a sequence classifier has there.
    dtype = "float32" if is_cpu and config.dtype == "auto" else config.dtype
    options: dict[str, Any] = {
        "model": model,
        "runner": "pooling",
        "dtype": "bfloat16" if dtype == "auto" else dtype,
        "max-model-len": config.max_length,
        "load-format": "safetensors",
        "disable-uvicorn-access-log": True,
    }
    if is_cpu:
        options |= {"enforce-eager": True, "block-size": 32}
    if config.revision is not None:
        options |= {"revision": config.revision, "tokenizer-revision": config.revision}
    if config.trust_remote_code:
        options["trust-remote-code"] = True
    given = {name.replace("_", "-"): value for name, value in config.engine_args.items()}
    arguments = []
    for name, value in {**options, **given}.items():
        if value is False:
            arguments.append(f"--no-{name}")
        else:
            arguments += [f"--{name}"] if value is True else [f"--{name}", _word(value)]
    return arguments


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
