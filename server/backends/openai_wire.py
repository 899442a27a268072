"""Requests for OpenAI's chat completions, in the dialects of those who serve them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from server.backends.base import Feature, Prompt, PromptError, SamplingSettings, Tools

# Fields of a request that takes its answers as they finish, with what they cost at its end.
STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}

# Fields that requests set themselves: nobody may add them unseen.
OWN_FIELDS = frozenset(
    {
        *("model", "messages", "tools", "tool_choice", "parallel_tool_calls", "response_format"),
        *("n", "seed", "stream", "stream_options", "logprobs", "top_logprobs", "stop"),
        *("temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens"),
        *("logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    }
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a kind of server takes beyond OpenAI's own fields.

    A field left out gets the server's default, which may be the model author's choice (vLLM,
    SGLang) or the server's own (llama.cpp): fields that a server is known to have are always sent.

    Attributes
    ----------
    features : frozenset of str
    no_top_k : int, optional
        The ``top_k`` that keeps all tokens; None where the field is not known.
    has_min_p, has_repetition : bool
        Whether ``min_p`` and ``repetition_penalty`` are known.
    can_hold_strict : bool
        Whether calls of tools with ``"strict": true`` always conform.
    """

    features: frozenset[Feature] = frozenset(
        {"penalties", "logit_bias", "json_schema", "tools", "logprobs"}
    )
    no_top_k: int | None = None
    has_min_p: bool = False
    has_repetition: bool = False
    can_hold_strict: bool = True


_OPENAI = Dialect()
_ALL: frozenset[Feature] = frozenset({*_OPENAI.features, "top_k", "min_p"})
# By `owned_by` of the model's card.
_DIALECTS = {
    "vllm": Dialect(_ALL, no_top_k=-1, has_min_p=True, has_repetition=True, can_hold_strict=False),
    "sglang": Dialect(_ALL, no_top_k=-1, has_min_p=True, has_repetition=True),
    # Its own repetition penalty looks at the last 64 tokens only: another thing than ours.
    "llamacpp": Dialect(_ALL, no_top_k=-1, has_min_p=True),
    # One of us; what more it has depends on its own backend.
    "palette": Dialect(frozenset({"top_k", "logprobs"}), no_top_k=0),
}


def dialect_of(owned_by: object) -> Dialect:
    """Return the dialect of a model card's ``owned_by``; OpenAI's where it is unknown."""
    return _DIALECTS.get(str(owned_by), _OPENAI)


def sampling_fields(
    sampling: SamplingSettings, dialect: Dialect, max_tokens_field: str
) -> dict[str, Any]:
    """Return the fields of a request that say how candidates are drawn.

    Raises
    ------
    PromptError
        For a repetition penalty that the upstream does not know.
    """
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        max_tokens_field: sampling.max_tokens,
    }
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.top_k or dialect.no_top_k is not None:
        fields["top_k"] = sampling.top_k or dialect.no_top_k
    if sampling.min_p or dialect.has_min_p:
        fields["min_p"] = sampling.min_p
    if dialect.has_repetition:
        fields["repetition_penalty"] = sampling.repetition_penalty
    elif sampling.repetition_penalty != 1:
        msg = (
            "the upstream model server has no repetition_penalty; leave it out, or use "
            "presence_penalty and frequency_penalty"
        )
        raise PromptError(msg)
    for name in ("presence_penalty", "frequency_penalty"):
        if penalty := getattr(sampling, name):
            fields[name] = penalty
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.json_schema is not None:
        fields["response_format"] = _response_format(json.loads(sampling.json_schema))
    return fields


def _response_format(schema: dict[str, Any]) -> dict[str, Any]:
    if schema == {"type": "object"}:
        return {"type": "json_object"}
    # Strict: without it, OpenAI's own models follow the schema or do not.
    named = {"name": "answer", "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": named}


def conversation_fields(prompt: Prompt) -> dict[str, Any]:
    """Return the fields of a request that say what is answered."""
    fields: dict[str, Any] = {"messages": list(prompt.messages)}
    if prompt.tools is not None:
        fields |= _tool_fields(prompt.tools)
    return fields


def _tool_fields(tools: Tools) -> dict[str, Any]:
    choice: Any = tools.choice
    if choice not in ("auto", "none", "required"):
        choice = {"type": "function", "function": {"name": choice}}
    return {
        "tools": [json.loads(definition) for definition in tools.definitions],
        "tool_choice": choice,
        "parallel_tool_calls": tools.is_parallel,
    }
