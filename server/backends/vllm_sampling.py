"""From sampling settings to vLLM's, and from what vLLM returns to a candidate."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

from server.backends.base import Candidate, FinishReason, SamplingSettings, TokenLogprob
from server.backends.hf_text import Detokenizer, StopFinder

# vLLM would silently raise anything between 0 and this to this.
LEAST_TEMPERATURE = 0.01


def engine_seed(seed: int, index: int) -> int:
    """Return the seed of one candidate, in [0, 2**63).

    Hashed: neighbouring requests with neighbouring seeds must not share candidates, as they would
    with seed + index.
    """
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def sampling_params(
    sampling: SamplingSettings,
    eos_ids: frozenset[int],
    seed: int,
    index: int,
    top_logprobs: int | None,
) -> Any:
    """Return vLLM's parameters of one candidate, a request of its own.

    Parameters
    ----------
    sampling : SamplingSettings
        With `max_tokens` already cut to the context.
    eos_ids : frozenset of int
        Every token that ends an answer.
    seed, index : int
        Of the request and the candidate.
    top_logprobs : int or None
        None for no log-probabilities at all.

    Raises
    ------
    ValueError
        For what vLLM cannot do; vLLM's own errors are of this class or `VLLMValidationError`.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    if 0 < sampling.temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature is {sampling.temperature}; this backend takes 0 (greedy) or at least "
            f"{LEAST_TEMPERATURE}"
        )
    stop = [text for text in sampling.stop if text]
    structured = None
    if sampling.json_schema is not None:
        structured = StructuredOutputsParams(json=sampling.json_schema)
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        max_tokens=sampling.max_tokens,
        stop=stop or None,
        stop_token_ids=sorted(eos_ids),
        seed=engine_seed(seed, index),
        logprobs=top_logprobs,
        flat_logprobs=True,
        structured_outputs=structured,
        output_kind=RequestOutputKind.FINAL_ONLY,
        # Only to find stop strings on the way; texts are decoded once, at the end.
        detokenize=bool(stop),
    )


def candidate_of(
    output: Any,
    index: int,
    detokenizer: Detokenizer,
    eos_ids: frozenset[int],
    stop: tuple[str, ...],
    top_logprobs: int,
) -> Candidate:
    """Return the candidate of vLLM's finished output.

    Parameters
    ----------
    output : CompletionOutput
    index : int
    detokenizer : Detokenizer
    eos_ids : frozenset of int
    stop : tuple of str
    top_logprobs : int
    """
    ids = list(output.token_ids)
    n_kept = len(ids)
    reason: FinishReason = "length" if output.finish_reason == "length" else "stop"
    if isinstance(output.stop_reason, str):
        finder = StopFinder(detokenizer, tuple(text for text in stop if text))
        for token_id in ids:
            finder.push(token_id)
        text = output.text
        n_kept = finder.n_tokens_of(text)
    else:
        if ids and ids[-1] in eos_ids:
            n_kept -= 1
        text = detokenizer.text(ids[:n_kept])
    return Candidate(
        index=index,
        text=text,
        tokens=tuple(
            (TokenLogprob(detokenizer.token(token_id), math.nan) for token_id in ids[:n_kept])
            if output.logprobs is None
            else _tokens(output.logprobs, n_kept, detokenizer, top_logprobs)
        ),
        n_tokens=len(ids),
        finish_reason=reason,
        token_ids=tuple(ids[:n_kept]),
    )


def _tokens(
    logprobs: Any, n_tokens: int, detokenizer: Detokenizer, top_logprobs: int
) -> Iterator[TokenLogprob]:
    """Yield the first tokens; at each place vLLM lists the one sampled, then the likeliest."""
    for start in logprobs.start_indices[:n_tokens]:
        likeliest = range(start + 1, start + 1 + top_logprobs)
        yield TokenLogprob(
            detokenizer.token(logprobs.token_ids[start]),
            logprobs.logprobs[start],
            tuple(
                (detokenizer.token(logprobs.token_ids[i]), logprobs.logprobs[i]) for i in likeliest
            ),
        )
