"""Questions about answers, as requests of one token to vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from rewards import Judgement, Sample
from server.backends.asking import Asker
from server.backends.vllm_process import Engine
from server.backends.vllm_requests import Requests


async def ask(
    requests: Requests,
    engine: Engine,
    asker: Asker,
    sample: Sample,
    questions: Sequence[str],
    words: Sequence[Sequence[str]],
    lora: Any,
) -> Judgement:
    """Return what `Backend.ask` promises; `lora` is from `lora_request`, None for the model's own.

    Raises
    ------
    BackendError
    """
    if sample.prompt_ids is None:
        prompts = await asyncio.to_thread(asker.prompts, sample, questions)
    else:
        prompts = asker.prompts(sample, questions)
    word_ids = asker.word_ids(words)
    params = asking_params(word_ids)

    async def ask_one(index: int, name: str) -> tuple[int, list[float]]:
        output = await requests.output(engine, prompts[index], params, name, lora)
        return index, answer_of(output, word_ids)

    found = np.empty((len(questions), len(word_ids)))
    async with aclosing(requests.each(engine, len(questions), ask_one)) as answers:
        async for index, logprobs in answers:
            found[index] = logprobs
    return Judgement(found, sum(map(len, prompts)))


def asking_params(word_ids: Sequence[Sequence[int]]) -> Any:
    """Return vLLM's parameters of a question: how likely these tokens are as the first."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprob_token_ids=[one for group in word_ids for one in group],
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=False,
        # A copy of each request's own would cost as much as the rest of it here.
        skip_clone=True,
    )


def answer_of(output: Any, word_ids: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-probability that the first token is one of each set, in nats."""
    found = output.logprobs
    # The token that was sampled stands first, and again where it was asked for.
    logprobs = dict(zip(found.token_ids, found.logprobs, strict=True))
    return [float(np.logaddexp.reduce([logprobs[one] for one in group])) for group in word_ids]
