"""vLLM's asynchronous engine as a backend: starts and ends it, and says to it what is asked.

The engine runs in its own process; a `Supervisor` starts it again when it dies. Conversations are
rendered, and answers decoded, by the tokenizer that the transformers backend uses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from rewards import Judgement, Message, Sample
from server.backends.asking import Asker
from server.backends.base import (
    Backend,
    BackendUnavailableError,
    Candidate,
    Feature,
    Prompt,
    SamplingSettings,
    Tools,
)
from server.backends.vllm_adapter import Adapter, VllmAdapter, lora_request, read_adapters
from server.backends.vllm_asking import ask
from server.backends.vllm_drawing import draw
from server.backends.vllm_options import by_python_name
from server.backends.vllm_preparing import prepare
from server.backends.vllm_process import Engine, start_engine
from server.backends.vllm_requests import Requests
from server.backends.vllm_supervisor import Supervisor
from server.backends.vllm_tools import AnswerReader, call_schema
from server.backends.vllm_watchdog import watch_for_hangs

if TYPE_CHECKING:
    from server.backends.vllm_text import TextModel

# Rendering up to here takes less than a millisecond, about what a change of thread can cost.
_RENDER_INLINE_CHARACTERS = 4_000


@dataclass(frozen=True, slots=True)
class _Words:
    """What reads and writes for a model that runs: conversations, answers, questions."""

    text: TextModel
    reader: AnswerReader
    asker: Asker


class VllmEngineBackend(Backend):
    """Candidates from vLLM, on one or several GPUs, or a CPU.

    `generate` and `ask` take an adapter beside what every backend's take; None is the model itself.

    Parameters
    ----------
    model : str
        Folder or hub name. Only safetensors weights are read.
    model_id : str, optional
        The name clients use; `model` when left out.
    revision : str, optional
        Branch, tag or commit of a hub model.
    dtype : str
        "auto" is float32 on a CPU and what the weights are on a GPU.
    max_context : int, optional
        Tokens that prompt and answer may have together, where less than the model's own.
    trust_remote_code : bool
        Run Python that comes with the model.
    max_rows : int
        Answers in progress at most; what more is asked for waits.
    n_threads : int, optional
        Threads of one operation on a CPU; by default all cores.
    engine_args : mapping of str to Any
        vLLM's own engine options, by its names in Python or on its command line.
    tool_call_parser : str, optional
        vLLM's name of the parser of the model's tool calls. That of its thinking is vLLM's own
        engine option ``reasoning_parser``, which also keeps schemas off the thinking.
    lora : mapping of str to str
        Names and folders of LoRA adapters: see `adapters`.
    rewards_bytes : int
        Memory of the first GPU that is kept for reward models.
    max_restarts : int
        How often an engine that died is started again within an hour.
    timeout_s : float
        An engine that had requests this long and gave no token is killed, and so started again.
    """

    features: frozenset[Feature] = frozenset(
        {
            "top_k",
            "min_p",
            "penalties",
            "logit_bias",
            "json_schema",
            "tools",
            "logprobs",
            "raw_prompts",
        }
    )

    def __init__(
        self,
        model: str,
        *,
        model_id: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        max_context: int | None = None,
        trust_remote_code: bool = False,
        max_rows: int = 256,
        n_threads: int | None = None,
        engine_args: Mapping[str, Any] | None = None,
        tool_call_parser: str | None = None,
        lora: Mapping[str, str] | None = None,
        rewards_bytes: int = 0,
        max_restarts: int = 3,
        timeout_s: float = 300.0,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; it must be at least 1")
        self.model_id = model_id or model
        self.fingerprint = ""
        self.max_context = 0
        options = by_python_name(engine_args or {})
        self._adapters = read_adapters(lora or {})
        self._prepare = partial(
            prepare,
            model,
            revision=revision,
            dtype=dtype,
            max_context=max_context,
            trust_remote_code=trust_remote_code,
            max_rows=max_rows,
            n_threads=n_threads,
            engine_args=options,
            tool_call_parser=tool_call_parser,
            adapters=self._adapters,
            rewards_bytes=rewards_bytes,
        )
        self._options: Mapping[str, Any] = {}
        self._environment: Mapping[str, str] = {}
        self._requests = Requests(lambda engine: self._supervisor.report_end(engine))
        self._supervisor: Supervisor[Engine] = Supervisor(
            lambda: start_engine(self._options, self._environment),
            self._requests.fail_all,
            max_restarts=max_restarts,
        )
        self._timeout_s = timeout_s
        self._watchdog: asyncio.Task[None] | None = None
        self._is_started = False
        self._words: _Words | None = None

    @property
    @override
    def adapters(self) -> tuple[VllmAdapter, ...]:
        """A backend for each LoRA adapter, to be started after this one."""
        return tuple(VllmAdapter(self, adapter) for adapter in self._adapters)

    @override
    async def start(self) -> None:
        if self._is_started:
            raise BackendUnavailableError("this backend was started before; create another")
        self._is_started = True
        prepared = await asyncio.to_thread(self._prepare)
        self._options, self._environment = prepared.options, prepared.environment
        engine = await self._supervisor.start()
        # vLLM may fit the context to the memory it finds ("max_model_len": -1).
        self.max_context = min(prepared.text.max_context, engine.max_context)
        text = replace(prepared.text, max_context=self.max_context)
        self._words = _Words(text, prepared.reader, Asker(text.tokenizer, self.max_context))
        self.n_vocab = text.n_vocab
        self.fingerprint = text.fingerprint
        self.revision, self.chat_template = text.commit, text.chat_template
        self._watchdog = asyncio.create_task(
            watch_for_hangs(self._engine, lambda: self._requests.n_active, self._timeout_s),
            name="palette-engine-watchdog",
        )

    @override
    async def close(self) -> None:
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.cancel()
            await asyncio.gather(watchdog, return_exceptions=True)
        self._requests.fail_all(BackendUnavailableError("the model was stopped; retry later"))
        await self._supervisor.close()
        self._words = None

    @override
    async def render(self, messages: Sequence[Message], tools: Tools | None = None) -> Prompt:
        words = self._loaded()
        if tools is not None:
            words.reader.check(tools)
            call_schema(tools)
        n_characters = sum(len(message["content"]) for message in messages)
        if n_characters <= _RENDER_INLINE_CHARACTERS:
            return words.text.render(messages, tools)
        return await asyncio.to_thread(words.text.render, messages, tools)

    @override
    async def read(self, text: str | Sequence[int]) -> Prompt:
        model = self._loaded().text
        if len(text) <= _RENDER_INLINE_CHARACTERS:
            return model.read(text)
        return await asyncio.to_thread(model.read, text)

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
        adapter: Adapter | None = None,
    ) -> AsyncIterator[Candidate]:
        words, engine = self._loaded(), self._supervisor.engine
        stream = draw(
            self._requests,
            engine,
            words.text,
            words.reader,
            prompt,
            n_candidates,
            sampling,
            seed,
            top_logprobs=top_logprobs,
            wants_logprobs=wants_logprobs,
            lora=None if adapter is None else lora_request(adapter),
        )
        async with aclosing(stream):
            async for candidate in stream:
                yield candidate

    @override
    def check_words(self, words: Sequence[Sequence[str]]) -> None:
        self._loaded().asker.word_ids(words)

    @override
    async def ask(
        self,
        sample: Sample,
        questions: Sequence[str],
        words: Sequence[Sequence[str]],
        *,
        adapter: Adapter | None = None,
    ) -> Judgement:
        asker, engine = self._loaded().asker, self._supervisor.engine
        lora = None if adapter is None else lora_request(adapter)
        return await ask(self._requests, engine, asker, sample, questions, words, lora)

    @override
    def health(self) -> dict[str, object]:
        engine = self._engine()
        pids = [] if engine is None else engine.pids
        return {**self._supervisor.health(), "pids": pids, **self._requests.health()}

    def _engine(self) -> Engine | None:
        with suppress(BackendUnavailableError):
            return self._supervisor.engine
        return None

    def _loaded(self) -> _Words:
        if self._words is None:
            raise BackendUnavailableError("the model is not running; retry later")
        return self._words
