"""Any Hugging Face causal language model with a chat template, run in this process.

Three kinds of thing meet here: the event loop (queues, futures), the worker thread that owns torch
(`hf_worker`), and the caller's conversation. Nothing in this file touches a tensor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from rewards import Judgement, Message, Sample
from server.backends.asking import Asker
from server.backends.base import (
    Backend,
    BackendError,
    BackendUnavailableError,
    Candidate,
    ContextLengthError,
    ModelLoadError,
    Prompt,
    PromptError,
    SamplingSettings,
    Tools,
)
from server.backends.hf_worker import Job, Worker

if TYPE_CHECKING:
    from server.backends.hf_loading import LoadedModel

# Rendering up to here takes less than a millisecond, about what a change of thread can cost.
_RENDER_INLINE_CHARACTERS = 4_000
_MAX_TOP_LOGPROBS = 20


class HfLocalBackend(Backend):
    """Candidates from a transformers model, on a CPU or one GPU.

    Parameters
    ----------
    model : str
        Folder or hub name. Only safetensors weights are read.
    model_id : str, optional
        The name clients use; the folder's own or the hub name when left out.
    revision : str, optional
        Branch, tag or commit of a hub model.
    device : str
        "auto" takes a GPU where there is one.
    dtype : str
        "auto" is float32 on a CPU and what the weights are on a GPU.
    max_context : int, optional
        Tokens that prompt and answer may have together, where less than the model's own.
    trust_remote_code : bool
        Run Python that comes with the model.
    max_rows : int
        Answers in progress at most; what more is asked for waits.
    """

    features = frozenset({"top_k", "min_p", "penalties", "logit_bias", "logprobs", "raw_prompts"})

    def __init__(
        self,
        model: str,
        *,
        model_id: str | None = None,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_context: int | None = None,
        trust_remote_code: bool = False,
        max_rows: int = 256,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; it must be at least 1")
        self.model_id = model_id or _default_id(model)
        self.fingerprint = ""
        self.max_context = 0
        self._model = model
        self._options: dict[str, Any] = {
            "revision": revision,
            "device": device,
            "dtype": dtype,
            "max_context": max_context,
            "trust_remote_code": trust_remote_code,
        }
        self._max_rows = max_rows
        self._worker: Worker | None = None
        self._tokenizer: Any = None
        self._asker: Asker | None = None
        self._template_errors: tuple[type[Exception], ...] = ()

    @override
    async def start(self) -> None:
        if self._worker is not None:
            raise BackendUnavailableError("this backend was started before; create another")
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[LoadedModel | ModelLoadError] = loop.create_future()

        def report(outcome: LoadedModel | ModelLoadError) -> None:
            # Done already when whoever started it was cancelled meanwhile.
            _call(loop, lambda: None if loaded.done() else loaded.set_result(outcome))

        self._worker = Worker(self._load, self._max_rows, report)
        self._worker.start()
        outcome = await loaded
        if isinstance(outcome, ModelLoadError):
            raise outcome
        from jinja2 import TemplateError

        # Besides jinja's own, templates fail as the Python they are: None + "text", a missing key.
        self._template_errors = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
        self._tokenizer = outcome.tokenizer
        self.fingerprint = outcome.fingerprint
        self.max_context = outcome.max_context
        self.n_vocab = outcome.n_vocab
        self._asker = Asker(outcome.tokenizer, outcome.max_context)
        self.revision = outcome.commit
        self.chat_template = outcome.chat_template

    @override
    async def close(self) -> None:
        if self._worker is not None:
            # In a thread: the worker ends its step first, which may take a while.
            await asyncio.to_thread(self._worker.close)
        self._tokenizer = None

    @override
    async def render(self, messages: Sequence[Message], tools: Tools | None = None) -> Prompt:
        if tools is not None:
            raise PromptError("this backend cannot call tools; leave `tools` out")
        if self._tokenizer is None:
            raise BackendUnavailableError("the model is not running; retry later")
        n_characters = sum(len(message["content"]) for message in messages)
        if n_characters <= _RENDER_INLINE_CHARACTERS:
            ids = self._token_ids(messages)
        else:
            ids = await asyncio.to_thread(self._token_ids, messages)
        if len(ids) >= self.max_context:
            raise self._too_long(len(ids), "messages")
        return Prompt(tuple(messages), tuple(ids))

    @override
    async def read(self, text: str | Sequence[int]) -> Prompt:
        if self._tokenizer is None:
            raise BackendUnavailableError("the model is not running; retry later")
        if len(text) <= _RENDER_INLINE_CHARACTERS:
            ids, words = self._raw(text)
        else:
            ids, words = await asyncio.to_thread(self._raw, text)
        if not ids:
            raise PromptError("there is no token to continue; give a text that is not empty")
        if len(ids) >= self.max_context:
            raise self._too_long(len(ids), "prompt")
        return Prompt((Message(role="user", content=words),), tuple(ids), is_raw=True)

    @override
    async def generate(
        self,
        prompt: Prompt,
        n_candidates: int,
        sampling: SamplingSettings,
        seed: int,
        *,
        top_logprobs: int = 0,
        wants_logprobs: bool = True,
    ) -> AsyncIterator[Candidate]:
        worker = self._worker
        if worker is None or self._tokenizer is None:
            raise BackendUnavailableError("the model is not running; retry later")
        room = self.max_context - len(prompt.token_ids)
        if room < 1:
            raise self._too_long(len(prompt.token_ids), "prompt" if prompt.is_raw else "messages")
        if n_candidates < 1 or sampling.max_tokens < 1 or not prompt.token_ids:
            raise ValueError("n_candidates, max_tokens and the prompt's length must be at least 1")
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[Candidate | BackendError] = asyncio.Queue()
        job = Job(
            prompt=prompt,
            n_candidates=n_candidates,
            sampling=replace(sampling, max_tokens=min(sampling.max_tokens, room)),
            seed=seed,
            top_logprobs=min(top_logprobs, _MAX_TOP_LOGPROBS),
            deliver=lambda item: _call(loop, lambda: arrivals.put_nowait(item)),
        )
        worker.submit(job)
        try:
            for _ in range(n_candidates):
                item = await arrivals.get()
                if isinstance(item, BackendError):
                    raise item
                yield item
        finally:
            # Also when the consumer closes the iterator or its task is cancelled.
            worker.cancel(job)

    @override
    def check_words(self, words: Sequence[Sequence[str]]) -> None:
        self._loaded_asker().word_ids(words)

    @override
    async def ask(
        self, sample: Sample, questions: Sequence[str], words: Sequence[Sequence[str]]
    ) -> Judgement:
        from server.backends.hf_asking import Inquiry

        asker, worker = self._loaded_asker(), self._worker
        assert worker is not None  # loaded
        loop = asyncio.get_running_loop()
        found: asyncio.Future[NDArray[np.float64] | BackendError] = loop.create_future()
        if sample.prompt_ids is None or sample.answer_ids is None:
            prompts = await asyncio.to_thread(asker.prompts, sample, questions)
            head: tuple[int, ...] = ()
        else:
            prompts, head = asker.prompts(sample, questions), sample.prompt_ids
        inquiry = Inquiry(
            prompts=prompts,
            head=head,
            word_ids=asker.word_ids(words),
            deliver=lambda item: _call(
                loop, lambda: None if found.done() else found.set_result(item)
            ),
        )
        worker.ask(inquiry)
        try:
            item = await found
        finally:
            worker.cancel(inquiry)
        if isinstance(item, BackendError):
            raise item
        return Judgement(item, sum(map(len, prompts)))

    @override
    def health(self) -> dict[str, object]:
        if self._worker is None:
            return {"state": "stopped"}
        return self._worker.health()

    def _loaded_asker(self) -> Asker:
        if self._asker is None or self._tokenizer is None:
            raise BackendUnavailableError("the model is not running; retry later")
        return self._asker

    def _load(self) -> LoadedModel:
        try:
            from server.backends.hf_loading import load_model
        except ImportError as error:
            raise ModelLoadError(
                f"transformers models need torch, transformers and jinja2 ({error}); install them "
                "with: pip install torch transformers jinja2"
            ) from error
        return load_model(self._model, **self._options)

    def _token_ids(self, messages: Sequence[Message]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except self._template_errors as error:
            raise PromptError(
                f"the chat template of {self.model_id} refuses this conversation: {error}"
            ) from error
        # The template has written the special tokens; `verbose` would warn of long texts.
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(token) for token in ids]

    def _raw(self, text: str | Sequence[int]) -> tuple[list[int], str]:
        """Return a raw prompt as the model reads it, with its start token if it has one, and text.

        Ids are taken as they are.
        """
        if not isinstance(text, str):
            return list(text), str(self._tokenizer.decode(list(text), skip_special_tokens=True))
        ids = self._tokenizer(text, verbose=False)["input_ids"] if text else []
        return [int(token) for token in ids], text

    def _too_long(self, n_tokens: int, what: str) -> ContextLengthError:
        return ContextLengthError(
            f"This model's maximum context length is {self.max_context} tokens. However, your "
            f"{what} resulted in {n_tokens} tokens. Please reduce the length of the {what}."
        )


def _default_id(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _call(loop: asyncio.AbstractEventLoop, action: Any) -> None:
    """Run `action` on the loop, from the worker thread; nobody is left to hear it once closed."""
    with suppress(RuntimeError):  # "Event loop is closed"
        loop.call_soon_threadsafe(action)
