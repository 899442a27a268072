"""vLLM's asynchronous engine: N candidates, each a request of its own, share the prompt's prefill.

The engine runs in its own process; a `Supervisor` starts it again when it dies. Conversations are
rendered, and answers decoded, by the tokenizer that the transformers backend uses.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from rewards import Judgement, Message, Sample
from server.backends.asking import Asker
from server.backends.base import (
    Backend,
    BackendError,
    BackendUnavailableError,
    Candidate,
    Feature,
    Prompt,
    PromptError,
    SamplingSettings,
    Tools,
)
from server.backends.vllm_adapter import (
    Adapter,
    VllmAdapter,
    adapter_options,
    lora_request,
    read_adapters,
)
from server.backends.vllm_asking import TwoKinds, answer_of, asking_params, kind_of
from server.backends.vllm_memory import split_gpu
from server.backends.vllm_options import (
    by_python_name,
    context_wanted,
    engine_environment,
    engine_options,
)
from server.backends.vllm_process import Engine, option_names, start_engine
from server.backends.vllm_sampling import candidate_of, sampling_params
from server.backends.vllm_supervisor import Supervisor
from server.backends.vllm_tools import AnswerReader, call_schema, enforced_schema
from server.backends.vllm_watchdog import watch_for_hangs

if TYPE_CHECKING:
    from server.backends.vllm_text import TextModel

# Rendering up to here takes less than a millisecond, about what a change of thread can cost.
_RENDER_INLINE_CHARACTERS = 4_000
_MAX_TOP_LOGPROBS = 20


def is_vllm_usable() -> bool:
    """Whether vLLM is installed and there is a GPU for it; loads torch, not vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


class VllmEngineBackend(Backend):
    """Candidates from vLLM, on one or several GPUs, or a CPU.

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
        self._model = model
        self._revision = revision
        self._dtype = dtype
        self._max_context = max_context
        self._trust_remote_code = trust_remote_code
        self._max_rows = max_rows
        self._n_threads = n_threads
        self._engine_args = by_python_name(engine_args or {})
        self._adapters = read_adapters(lora or {})
        self._rewards_bytes = rewards_bytes
        self._text: TextModel | None = None
        self._tool_call_parser = tool_call_parser
        self._reader: AnswerReader | None = None
        self._options: dict[str, Any] = {}
        self._environment: dict[str, str] = {}
        self._supervisor: Supervisor[Engine] = Supervisor(
            lambda: start_engine(self._options, self._environment),
            self._fail_all,
            max_restarts=max_restarts,
        )
        self._timeout_s = timeout_s
        self._watchdog: asyncio.Task[None] | None = None
        self._is_started = False
        self._active: set[asyncio.Queue[Any]] = set()
        self._ids = itertools.count()
        self._n_prompt_tokens = 0
        self._n_cached_tokens = 0
        self._asker: Asker | None = None
        self._kinds = TwoKinds()
        self._n_asked_tokens = 0
        self._n_cached_asked_tokens = 0
        self._stages = {"waiting": 0.0, "prefill": 0.0, "decode": 0.0}
        # By the thread of `start`: vLLM's, which is not imported before.
        self._refusals: tuple[type[Exception], ...] = ()
        self._dead: tuple[type[Exception], ...] = ()

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
        text = await asyncio.to_thread(self._prepare)
        engine = await self._supervisor.start()
        # vLLM may fit the context to the memory it finds ("max_model_len": -1).
        self.max_context = min(text.max_context, engine.max_context)
        self.n_vocab = text.n_vocab
        self._text = replace(text, max_context=self.max_context)
        self.fingerprint = text.fingerprint
        self._asker = Asker(text.tokenizer, self.max_context)
        self.revision, self.chat_template = text.commit, text.chat_template
        self._watchdog = asyncio.create_task(
            watch_for_hangs(self._engine, lambda: len(self._active), self._timeout_s),
            name="palette-engine-watchdog",
        )

    @override
    async def close(self) -> None:
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.cancel()
            await asyncio.gather(watchdog, return_exceptions=True)
        self._fail_all(BackendUnavailableError("the model was stopped; retry later"))
        await self._supervisor.close()
        self._text = None

    @override
    async def render(self, messages: Sequence[Message], tools: Tools | None = None) -> Prompt:
        text = self._loaded()
        if tools is not None and self._reader is not None:
            self._reader.check(tools)
            call_schema(tools)
        n_characters = sum(len(message["content"]) for message in messages)
        if n_characters <= _RENDER_INLINE_CHARACTERS:
            return text.render(messages, tools)
        return await asyncio.to_thread(text.render, messages, tools)

    @override
    async def read(self, text: str | Sequence[int]) -> Prompt:
        model = self._loaded()
        if len(text) <= _RENDER_INLINE_CHARACTERS:
            return model.read(text)
        return await asyncio.to_thread(model.read, text)

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
        return self.draw(
            prompt,
            n_candidates,
            sampling,
            seed,
            top_logprobs=top_logprobs,
            wants_logprobs=wants_logprobs,
        )

    async def draw(
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
        """Yield what `generate` promises, of the model with an adapter or without."""
        text, engine = self._loaded(), self._supervisor.engine
        text.check_length(prompt.token_ids, "prompt" if prompt.is_raw else "messages")
        room = self.max_context - len(prompt.token_ids)
        if n_candidates < 1 or sampling.max_tokens < 1 or not prompt.token_ids:
            raise ValueError("n_candidates, max_tokens and the prompt's length must be at least 1")
        settings = replace(
            sampling,
            max_tokens=min(sampling.max_tokens, room),
            json_schema=enforced_schema(sampling.json_schema, prompt.tools),
        )
        top = min(top_logprobs, _MAX_TOP_LOGPROBS) if wants_logprobs else None
        arrivals: asyncio.Queue[Candidate | BackendError] = asyncio.Queue()
        name = f"palette-{next(self._ids)}"
        lora = None if adapter is None else lora_request(adapter)

        async def draw_one(index: int) -> None:
            try:
                params = sampling_params(settings, text.eos_ids, seed, index, top)
                output = await self._finished(engine, prompt, params, f"{name}-{index}", lora)
                candidate = candidate_of(
                    output, index, text.detokenizer, text.eos_ids, settings.stop, top or 0
                )
                arrivals.put_nowait(self._parsed(candidate, output, text, prompt))
            except Exception as error:  # noqa: BLE001  # told to the one who asked, below
                if isinstance(error, self._dead):
                    self._supervisor.report_end(engine)
                arrivals.put_nowait(self._translated(error))

        self._active.add(arrivals)
        drawing = [asyncio.create_task(draw_one(index)) for index in range(n_candidates)]
        try:
            for _ in range(n_candidates):
                item = await arrivals.get()
                if isinstance(item, BackendError):
                    raise item
                yield item
        finally:
            # Also when the consumer closes the iterator or its task is cancelled; a drawing that
            # is cancelled aborts its request in the engine.
            self._active.discard(arrivals)
            for task in drawing:
                task.cancel()
            await asyncio.gather(*drawing, return_exceptions=True)

    @override
    def check_words(self, words: Sequence[Sequence[str]]) -> None:
        self._loaded_asker().word_ids(words)

    @override
    async def ask(
        self, sample: Sample, questions: Sequence[str], words: Sequence[Sequence[str]]
    ) -> Judgement:
        return await self.ask_as(sample, questions, words)

    async def ask_as(
        self,
        sample: Sample,
        questions: Sequence[str],
        words: Sequence[Sequence[str]],
        adapter: Adapter | None = None,
    ) -> Judgement:
        """Return what `ask` promises, of the model with an adapter or without."""
        asker, engine = self._loaded_asker(), self._supervisor.engine
        if sample.prompt_ids is None:
            prompts = await asyncio.to_thread(asker.prompts, sample, questions)
        else:
            prompts = asker.prompts(sample, questions)
        word_ids = asker.word_ids(words)
        params = asking_params(word_ids)
        arrivals: asyncio.Queue[Any] = asyncio.Queue()
        name = f"palette-{next(self._ids)}"
        lora = None if adapter is None else lora_request(adapter)

        async def ask_one(index: int) -> None:
            prompt = Prompt((), tuple(prompts[index]))
            try:
                output = await self._finished(engine, prompt, params, f"{name}-{index}", lora)
                arrivals.put_nowait((index, answer_of(output, word_ids)))
            except Exception as error:  # noqa: BLE001  # told to the one who asked, below
                if isinstance(error, self._dead):
                    self._supervisor.report_end(engine)
                arrivals.put_nowait(self._translated(error))

        found = np.empty((len(questions), len(word_ids)))
        self._active.add(arrivals)
        asking = [asyncio.create_task(ask_one(index)) for index in range(len(questions))]
        try:
            for _ in questions:
                item = await arrivals.get()
                if isinstance(item, BackendError):
                    raise item
                found[item[0]] = item[1]
        finally:
            self._active.discard(arrivals)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        return Judgement(found, sum(map(len, prompts)))

    @override
    def health(self) -> dict[str, object]:
        engine = self._engine()
        pids = [] if engine is None else engine.pids
        return {
            **self._supervisor.health(),
            "pids": pids,
            "active_jobs": len(self._active),
            "prompt_tokens": self._n_prompt_tokens,
            "cached_prompt_tokens": self._n_cached_tokens,
            "asked_tokens": self._n_asked_tokens,
            "cached_asked_tokens": self._n_cached_asked_tokens,
            # Seconds, summed over candidates; vLLM measures them with disable_log_stats=false only.
            "candidate_seconds": {name: round(spent, 3) for name, spent in self._stages.items()},
        }

    async def _finished(
        self, engine: Engine, prompt: Prompt, params: Any, name: str, lora: Any
    ) -> Any:
        """Return vLLM's one output of a request."""
        tokens = {"type": "token", "prompt_token_ids": list(prompt.token_ids)}
        kind = kind_of(params)
        async with self._kinds.run(kind):
            async for result in engine.llm.generate(tokens, params, name, lora_request=lora):
                if result.finished:
                    self._count(kind, len(prompt.token_ids), result)
                    return result.outputs[0]
        raise BackendError("generation failed: the engine ended the request without an answer")

    def _count(self, kind: str, n_tokens: int, result: Any) -> None:
        n_cached = result.num_cached_tokens or 0
        if kind == "asked":
            self._n_asked_tokens += n_tokens
            self._n_cached_asked_tokens += n_cached
            return
        self._n_prompt_tokens += n_tokens
        self._n_cached_tokens += n_cached
        if (times := result.metrics) is not None:
            self._stages["waiting"] += times.scheduled_ts - times.queued_ts
            self._stages["prefill"] += times.first_token_ts - times.scheduled_ts
            self._stages["decode"] += times.last_token_ts - times.first_token_ts

    def _parsed(
        self, candidate: Candidate, output: Any, text: TextModel, prompt: Prompt
    ) -> Candidate:
        reader = self._reader
        if reader is None or prompt.is_raw:
            return candidate
        marked = ""
        if reader.needs_special_tokens(prompt.tools):
            marked = text.marked(list(output.token_ids)[: len(candidate.tokens)])
        elif prompt.tools is None:
            return candidate
        return reader.read(candidate, marked, prompt.tools)

    def _translated(self, error: Exception) -> BackendError:
        if isinstance(error, BackendError):
            return error
        translated: BackendError
        if isinstance(error, self._dead):
            translated = BackendUnavailableError("the model's engine has stopped; retry later")
        elif isinstance(error, self._refusals):
            translated = PromptError(f"the engine refuses this request: {error}")
        else:
            cause = error.__cause__ or error
            translated = BackendError(f"generation failed: {type(cause).__name__}: {cause}")
        translated.__cause__ = error
        return translated

    def _fail_all(self, error: BackendUnavailableError) -> None:
        for arrivals in self._active:
            arrivals.put_nowait(error)

    def _prepare(self) -> TextModel:
        """Check the options and read all but the weights; in a thread, for it imports vLLM."""
        known = option_names()
        from vllm.exceptions import VLLMValidationError
        from vllm.platforms import current_platform
        from vllm.v1.engine.exceptions import EngineDeadError

        from server.backends.vllm_text import load_text

        is_cpu = current_platform.is_cpu()
        self._dead = (EngineDeadError,)
        self._refusals = (VLLMValidationError, ValueError)
        text = load_text(
            self._model,
            revision=self._revision,
            max_context=context_wanted(self._max_context, self._engine_args),
            trust_remote_code=self._trust_remote_code,
            has_weights="load_format" not in self._engine_args,
        )
        self._options = engine_options(
            {**adapter_options(self._adapters, is_cpu=is_cpu), **self._engine_args},
            known,
            model=self._model,
            revision=self._revision,
            max_context=text.max_context,
            dtype=self._dtype,
            trust_remote_code=self._trust_remote_code,
            max_rows=self._max_rows,
            is_cpu=is_cpu,
        )
        self._reader = AnswerReader(
            text.tokenizer, self._tool_call_parser, self._options.get("reasoning_parser")
        )
        self._environment = engine_environment(self._n_threads, is_cpu=is_cpu)
        if self._rewards_bytes and current_platform.is_cuda_alike():
            self._options |= split_gpu(self._options, self._rewards_bytes, text.weights_bytes)
        return text

    def _loaded_asker(self) -> Asker:
        if self._asker is None or self._text is None:
            raise BackendUnavailableError("the model is not running; retry later")
        return self._asker

    def _engine(self) -> Engine | None:
        with suppress(BackendUnavailableError):
            return self._supervisor.engine
        return None

    def _loaded(self) -> TextModel:
        if self._text is None:
            raise BackendUnavailableError("the model is not running; retry later")
        return self._text
