"""Candidates of a prompt: N requests to vLLM's engine that share the prompt's prefill."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from server.backends.base import Candidate, Prompt, SamplingSettings
from server.backends.vllm_process import Engine
from server.backends.vllm_requests import Requests
from server.backends.vllm_sampling import candidate_of, sampling_params
from server.backends.vllm_tools import AnswerReader, enforced_schema

if TYPE_CHECKING:
    from server.backends.vllm_text import TextModel

_MAX_TOP_LOGPROBS = 20


def draw(
    requests: Requests,
    engine: Engine,
    text: TextModel,
    reader: AnswerReader,
    prompt: Prompt,
    n_candidates: int,
    sampling: SamplingSettings,
    seed: int,
    *,
    top_logprobs: int,
    wants_logprobs: bool,
    lora: Any,
) -> AsyncGenerator[Candidate, None]:
    """Return what `Backend.generate` yields; to be closed when it is not read to its end.

    Parameters
    ----------
    requests, engine
        What gets the requests.
    text, reader
        What knows the model's words.
    prompt, n_candidates, sampling, seed, top_logprobs, wants_logprobs
        See `Backend.generate`.
    lora : LoRARequest, optional
        From `lora_request`; None for the model without an adapter.

    Raises
    ------
    ValueError
        For less than one candidate or token.
    ContextLengthError, PromptError, BackendError
    """
    text.check_length(prompt.token_ids, "prompt" if prompt.is_raw else "messages")
    room = text.max_context - len(prompt.token_ids)
    if n_candidates < 1 or sampling.max_tokens < 1 or not prompt.token_ids:
        raise ValueError("n_candidates, max_tokens and the prompt's length must be at least 1")
    settings = replace(
        sampling,
        max_tokens=min(sampling.max_tokens, room),
        json_schema=enforced_schema(sampling.json_schema, prompt.tools),
    )
    top = min(top_logprobs, _MAX_TOP_LOGPROBS) if wants_logprobs else None

    async def draw_one(index: int, name: str) -> Candidate:
        params = sampling_params(settings, text.eos_ids, seed, index, top)
        output = await requests.output(engine, prompt.token_ids, params, name, lora)
        candidate = candidate_of(
            output, index, text.detokenizer, text.eos_ids, settings.stop, top or 0
        )
        return _parsed(candidate, output, text, reader, prompt)

    return requests.each(engine, n_candidates, draw_one)


def _parsed(
    candidate: Candidate, output: Any, text: TextModel, reader: AnswerReader, prompt: Prompt
) -> Candidate:
    """Return the candidate with calls and thinking taken out, where there can be any."""
    if prompt.is_raw:
        return candidate
    marked = ""
    if reader.needs_special_tokens(prompt.tools):
        marked = text.marked(list(output.token_ids)[: len(candidate.tokens)])
    elif prompt.tools is None:
        return candidate
    return reader.read(candidate, marked, prompt.tools)
