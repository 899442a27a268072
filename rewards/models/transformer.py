"""What every scorer does that runs a transformers model: load, refuse, render, encode, batch."""

from __future__ import annotations

import contextlib
import inspect
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from typing_extensions import override

from rewards.base import BatchedScorer, Facts, Rendered, Sample, Tokens
from rewards.batch import pad
from rewards.config import ChatInput, InputConfig, ModelConfig
from rewards.errors import RewardModelError, ScoringError
from rewards.hub import why_missing
from rewards.identity import hash_folder
from rewards.models.attention import attend_by_products
from rewards.models.budgets import linger_s
from rewards.models.device import resolve_dtype
from rewards.models.encoding import Encoder, Mark
from rewards.models.packing import can_pack, pack
from rewards.models.self_test import check_padding, check_vocabulary, trial_inputs
from rewards.models.views import View, make_view

logger = logging.getLogger(__name__)

# Some configurations promise 131,072 positions; nobody means to pay for that on every answer.
_DEFAULT_MAX_LENGTH = 2048


class TransformerScorer(BatchedScorer):
    """A transformers model and what is read from it. Subclasses read.

    Parameters
    ----------
    name, values
        As for every scorer.
    config : ModelConfig
    source : Path or str
        Model folder, or hub name.

    Attributes
    ----------
    AUTO_CLASS : str
        Class of transformers that loads the model.
    LACKING : str
        What to do about weights without a part that is read.
    """

    AUTO_CLASS: ClassVar[str]
    LACKING: ClassVar[str]

    _config: ModelConfig
    _view: View
    _encoder: Encoder

    def __init__(
        self, name: str, values: Sequence[str], config: ModelConfig, source: Path | str
    ) -> None:
        super().__init__(name, values)
        self.outputs = config.output_names
        self._config = config
        self._source = source
        self._weights = ""

    @override
    def identity(self, output: str) -> dict[str, object]:
        # Where a model comes from does not count, but what it is.
        places = {"model", "revision", "trust_remote_code", "allow_pickle", "max_length"}
        settings = self._config.model_dump(exclude=places)
        return {**settings, "max_length": self.max_length, "weights": self._weights}

    @override
    def load(self, device: str) -> None:
        source = self._source
        if isinstance(source, Path):
            if not (source / "config.json").is_file():
                missing = "it holds no config.json" if source.is_dir() else "no such folder"
                raise self._error(f"{missing}; put a transformers model there or correct the path")
            self._weights = hash_folder(source)
        try:
            tokenizer = self._load(device)
        except RewardModelError:
            raise
        except Exception as error:
            raise self._error(self._explain(error)) from error
        self._check(tokenizer)
        if can_pack(device) and not self._pack():
            logger.warning(
                "scorer %r: packed weights give other scores; left as they are", self.name
            )
            self._load(device)

    @override
    def facts(self) -> Facts:
        return self._facts

    @override
    def render(self, sample: Sample) -> Rendered:
        return self._view.render(sample)

    @override
    def encode(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        inputs = self._encoder(rendered)
        self._check_ids(inputs)
        return inputs

    @abstractmethod
    def _prepare_model(self, tokenizer: Any) -> None:
        """Make the model ready to be read.

        Raises
        ------
        ValueError
            When it lacks what is to be read. Message without the model's name.
        """

    @abstractmethod
    def _prepare_text(self, tokenizer: Any) -> None:
        """Make what renders and encodes; raises ValueError as `_prepare_model`."""

    def _load(self, device: str) -> Any:
        """Load tokenizer and model, and return the tokenizer."""
        config = self._config
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if isinstance(self._source, Path):
            options["local_files_only"] = True
        elif config.revision is not None:
            options["revision"] = config.revision
        with _quietly():
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._source, **options)
            model, info = getattr(transformers, self._auto_class(options)).from_pretrained(
                self._source,
                dtype=resolve_dtype(config.dtype, device),
                use_safetensors=None if config.allow_pickle else True,
                output_loading_info=True,
                **options,
            )
        missing = sorted(name for name in info["missing_keys"] if not self._does_without(name))
        if missing:
            # transformers fills what is missing with random numbers and goes on.
            names = ", ".join(missing[:4])
            problem = f"the weights lack {names}, so its scores would be random"
            raise self._error(f"{problem}. {self.LACKING}")
        if not self._weights:
            commit = getattr(model.config, "_commit_hash", None) or config.revision
            self._weights = f"{self._source}@{commit}"
        self._device = device
        self._model = model.eval().to(device)
        self.linger_s = linger_s(device, model.num_parameters())
        self._is_exact = next(model.parameters()).dtype == torch.float32
        self._facts = _facts(str(self._source), config.revision, model)
        text_config = model.config.get_text_config()
        text_config.use_cache = False  # nothing is generated: no key-value cache
        self._n_embeddings: int = model.get_input_embeddings().num_embeddings
        pad_id = tokenizer.pad_token_id
        if pad_id is None or pad_id >= self._n_embeddings:
            pad_id = text_config.pad_token_id
        self._has_pad_id = pad_id is not None
        self._pad_id: int = 0 if pad_id is None else int(pad_id)
        self._reads_type_ids = (
            "token_type_ids" in tokenizer.model_input_names
            and "token_type_ids" in inspect.signature(model.forward).parameters
            and getattr(text_config, "type_vocab_size", 0) > 1
        )
        if not tokenizer.is_fast:
            raise self._error("its tokenizer has no fast version; save it with a tokenizer.json")
        limit = _n_positions(model)
        if config.max_length is not None and limit is not None and config.max_length > limit:
            raise self._error(f"max_length {config.max_length} is more than the {limit} it reads")
        limits = [_DEFAULT_MAX_LENGTH, tokenizer.model_max_length, limit or _DEFAULT_MAX_LENGTH]
        self.max_length = config.max_length or min(limits)
        try:
            self._prepare_model(tokenizer)
            self._prepare_text(tokenizer)
        except ValueError as error:
            raise self._error(str(error)) from None
        return tokenizer

    def _auto_class(self, options: dict[str, Any]) -> str:
        """Return the class of transformers that loads the model."""
        return self.AUTO_CLASS

    def _does_without(self, weight: str) -> bool:
        """Return whether a weight that is not in the checkpoint is not needed either."""
        return False

    def _read_view(
        self,
        tokenizer: Any,
        config: InputConfig,
        *,
        prefill: str | None = None,
        mark: Mark | None = None,
    ) -> tuple[View, Encoder]:
        """Return what renders and encodes an input of this configuration."""
        view = make_view(config, tokenizer, prefill=prefill)
        specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, self._pad_id)
        encoder = Encoder(
            tokenizer.backend_tokenizer,
            self.max_length,
            adds_special_tokens=not isinstance(config, ChatInput),
            start_id=tokenizer.bos_token_id,
            empty_id=next(token for token in specials if token is not None),
            mark=mark,
        )
        return view, encoder

    def _tensors(self, batch: Sequence[Tokens], pad_id: int) -> dict[str, Tensor]:
        """Return the model's inputs of a batch, padded on the right, on the device."""
        ids, mask, type_ids = pad(batch, pad_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._reads_type_ids:
            inputs["token_type_ids"] = type_ids
        return {key: torch.from_numpy(array).to(self._device) for key, array in inputs.items()}

    def _check_ids(self, inputs: Sequence[Tokens]) -> None:
        largest = max(max(tokens.ids) for tokens in inputs)
        if largest >= self._n_embeddings:
            # On a GPU, looking up a token that is not there ends the whole process's use of it.
            problem = (
                f"token {largest} is beyond the {self._n_embeddings} that the model knows; its "
                "tokenizer is that of another model, or has tokens that were never trained"
            )
            raise ScoringError(self.name, self.values, problem)

    def _check(self, tokenizer: Any) -> None:
        """Refuse a model that would give wrong scores."""
        # bfloat16 has 8 bits: batching alone moves a sound score by a percent or two.
        rtol = 1e-3 if self._is_exact else 5e-2
        try:
            inputs = trial_inputs(self)
            check_vocabulary(inputs, tokenizer.unk_token_id, tokenizer.all_special_ids)
            check_padding(self, inputs, rtol)
            self._check_reading(tokenizer, inputs, rtol)
        except ValueError as error:
            raise self._error(str(error)) from error
        except Exception as error:
            raise self._error(f"a trial run failed: {type(error).__name__}: {error}") from error

    def _check_reading(self, tokenizer: Any, inputs: Sequence[Tokens], rtol: float) -> None:
        """Refuse a model that is read at a wrong place; raises ValueError as `_prepare_model`."""

    def _pack(self) -> bool:
        """Make the model faster; return False, the model then being spoilt, if scores change."""
        inputs = trial_inputs(self)
        plain = self.forward(inputs)
        pack(self._model)
        attend_by_products(self._model)
        try:
            packed = self.forward(inputs)
        except Exception:  # noqa: BLE001 - whatever this model does with its layers, it goes without
            return False
        rtol = 1e-4 if self._is_exact else 5e-2
        return bool(np.all(np.abs(packed - plain) <= rtol * (1.0 + np.abs(plain))))

    def _explain(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        if "trust_remote_code" in text:
            return "it comes with its own code; read it, then set trust_remote_code: true"
        if isinstance(self._source, Path):
            return (
                f"it cannot be loaded ({text}); it needs config.json, tokenizer files and complete "
                "safetensors weights (allow_pickle: true accepts older weight files)"
            )
        if "safetensors" in text:
            return f"it has no safetensors weights ({text}); allow_pickle: true accepts others"
        missing = why_missing(error)
        if missing is not None:
            return f"there is no such folder beside the rewards file, and {missing}"
        reason = text.partition("\n")[0]  # what follows tells of transformers
        return (
            f"there is no such folder beside the rewards file, and it cannot be fetched from the "
            f"hub ({reason}); correct the name, or download it and give the folder"
        )

    def _error(self, problem: str) -> RewardModelError:
        return RewardModelError(self.name, self.values, str(self._source), problem)


def _facts(source: str, revision: str | None, model: nn.Module) -> Facts:
    """Return the size of a model as it was loaded: packed weights are no parameters."""
    parameters = list(model.parameters())
    return Facts(
        model=source,
        revision=revision,
        n_parameters=sum(one.numel() for one in parameters),
        n_bytes=sum(one.numel() * one.element_size() for one in parameters),
    )


def in_float32(head: nn.Linear) -> nn.Linear:
    """Return the head of a model, made to compute in float32 whatever the model does.

    A bfloat16 score of 20 comes in steps of 0.125, and candidates would tie.
    """
    if head.weight.dtype != torch.float32:
        head.float().register_forward_pre_hook(lambda _, args: (args[0].float(),))
    return head


def _n_positions(model: Any) -> int | None:
    """Return the longest input that the model has positions for; None when it is not limited."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    offset = getattr(embeddings, "padding_idx", None)
    # RoBERTa and its kin count positions from behind the padding index: two fewer than declared.
    return limit if not isinstance(offset, int) else limit - offset - 1


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep progress bars off standard error; what they report is checked and raised instead."""
    library = transformers.utils.logging
    was_enabled = library.is_progress_bar_enabled()
    verbosity = library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if was_enabled:
            library.enable_progress_bar()
