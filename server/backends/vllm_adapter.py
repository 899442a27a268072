"""LoRA adapters: models of their own to clients, one engine with their base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from rewards import Judgement, Message, Sample
from server.backends.base import (
    Backend,
    BackendUnavailableError,
    Candidate,
    ModelLoadError,
    Prompt,
    SamplingSettings,
    Tools,
)

if TYPE_CHECKING:
    from server.backends.vllm_engine import VllmEngineBackend

# The ranks vLLM has room for; an adapter gets the next larger.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Adapters in one batch; each takes GPU memory, and more of them only wait for each other.
_MAX_IN_BATCH = 8
_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as it lies on disk.

    Attributes
    ----------
    name : str
        What clients call the model.
    folder : Path
    number : int
        vLLM's id of it, from 1.
    rank : int
    digest : str
        Of its files, hex.
    """

    name: str
    folder: Path
    number: int
    rank: int
    digest: str


def read_adapters(folders: Mapping[str, str]) -> tuple[Adapter, ...]:
    """Return the adapters of the folders, by name.

    Raises
    ------
    ModelLoadError
        For a folder that is no adapter in safetensors, or whose rank is too large.
    """
    return tuple(
        _read(name, Path(folder).expanduser(), number)
        for number, (name, folder) in enumerate(folders.items(), start=1)
    )


def adapter_options(adapters: Sequence[Adapter], *, is_cpu: bool) -> dict[str, Any]:
    """Return the engine options that make room for the adapters."""
    if not adapters:
        return {}
    largest = max(adapter.rank for adapter in adapters)
    # On a CPU vLLM adds its last slot's adapter to the rows of a mixed batch that have none: a slot
    # that is never filled adds nothing.
    n_slots = len(adapters) + 1 if is_cpu else min(len(adapters), _MAX_IN_BATCH)
    return {
        "enable_lora": True,
        "max_loras": n_slots,
        "max_cpu_loras": max(n_slots, len(adapters)),
        "max_lora_rank": next(rank for rank in _RANKS if rank >= largest),
    }


def lora_request(adapter: Adapter) -> Any:
    """Return what vLLM's requests name the adapter by; it is loaded with the first."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.name, adapter.number, str(adapter.folder))


def _read(name: str, folder: Path, number: int) -> Adapter:
    missing = [file for file in _FILES if not (folder / file).is_file()]
    if missing:
        raise ModelLoadError(
            f"the LoRA adapter {name!r} has no {' and no '.join(missing)} in {str(folder)!r}; "
            "give a folder written by peft's save_pretrained, in safetensors"
        )
    try:
        rank = int(json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))["r"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(
            f"the adapter_config.json of the LoRA adapter {name!r} is damaged; save it again"
        ) from error
    if not 1 <= rank <= _RANKS[-1]:
        raise ModelLoadError(f"the LoRA adapter {name!r} has rank {rank}, not 1..{_RANKS[-1]}")
    digest = hashlib.sha256(b"\0".join((folder / file).read_bytes() for file in _FILES))
    return Adapter(name, folder.resolve(), number, rank, digest.hexdigest())


class VllmAdapter(Backend):
    """Candidates of a base model with a LoRA adapter; `VllmEngineBackend.adapters` makes these.

    The base backend starts and closes the engine; until it is started this one cannot be used.
    """

    def __init__(self, base: VllmEngineBackend, adapter: Adapter) -> None:
        self.model_id = adapter.name
        self.fingerprint = ""
        self.max_context = 0
        self.features = base.features
        self._base = base
        self._adapter = adapter

    @override
    async def start(self) -> None:
        if not self._base.fingerprint:
            raise BackendUnavailableError("start the backend of the base model first")
        identity = f"lora\0{self._base.fingerprint}\0{self._adapter.digest}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self.max_context = self._base.max_context
        self.n_vocab = self._base.n_vocab
        self.revision, self.chat_template = self._base.revision, self._base.chat_template

    @override
    async def close(self) -> None:
        """Do nothing: the engine is the base's."""

    @override
    async def render(self, messages: Sequence[Message], tools: Tools | None = None) -> Prompt:
        return await self._base.render(messages, tools)

    @override
    async def read(self, text: str | Sequence[int]) -> Prompt:
        return await self._base.read(text)

    @override
    def generate(
        self,
        prompt: Prompt,
        n_candidates: int,
        sampling: SamplingSettings,
        seed: int,
        *,
        top_logprobs: int = 0,
        wants_logprobs: bool = True,
    ) -> AsyncIterator[Candidate]:
        return self._base.generate(
            prompt,
            n_candidates,
            sampling,
            seed,
            top_logprobs=top_logprobs,
            wants_logprobs=wants_logprobs,
            adapter=self._adapter,
        )

    @override
    def check_words(self, words: Sequence[Sequence[str]]) -> None:
        self._base.check_words(words)

    @override
    async def ask(
        self, sample: Sample, questions: Sequence[str], words: Sequence[Sequence[str]]
    ) -> Judgement:
        return await self._base.ask(sample, questions, words, adapter=self._adapter)

    @override
    def health(self) -> dict[str, object]:
        return self._base.health()
