"""From a body to what is asked of the aligner; what the backend cannot do is refused here."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import TypeVar

from fastapi.exceptions import RequestValidationError

from server.alignment_stages import AlignmentRequest
from server.backends.base import Backend, Feature, SamplingSettings, Tools
from server.messages import JsonObjectFormat, JsonSchemaFormat, NamedToolChoice
from server.openai_requests import ChatCompletionRequest, CompletionRequest, SamplingRequest
from server.routes.context import Context
from server.schemas import PaletteOptions
from server.settings import Settings

# OpenAI's default of text completions; chats have no such default.
COMPLETION_TOKENS = 16

T = TypeVar("T")


def refusal(param: str, message: str, kind: str = "unsupported") -> RequestValidationError:
    """Return the error of a field that is well-formed and cannot be had here."""
    return RequestValidationError([{"loc": ("body", param), "msg": message, "type": kind}])


def chat_request(body: ChatCompletionRequest, context: Context, answer_id: str) -> AlignmentRequest:
    """Return what a chat body asks for, with the operator's defaults filled in.

    Raises
    ------
    RequestValidationError
        When the backend lacks what is asked; it names the field and the remedy.
    """
    limit = _or(body.max_completion_tokens, body.max_tokens)
    return _checked(
        AlignmentRequest(
            messages=tuple(message.message() for message in body.messages),
            sampling=_sampling(body, limit, context.settings),
            n_choices=_or(body.n, 1),
            seed=_seed(body),
            palette=_palette(body, context.settings),
            top_logprobs=body.top_logprobs or 0,
            wants_logprobs=bool(body.logprobs),
            tools=_tools(body),
            answer_id=answer_id,
        ),
        context.aligner.backend,
    )


def completion_requests(
    body: CompletionRequest, context: Context, answer_id: str
) -> list[AlignmentRequest]:
    """Return what a text completion body asks for, one request a prompt.

    Raises
    ------
    RequestValidationError
        As `chat_request`.
    """
    seed = _seed(body)
    return [
        _checked(
            AlignmentRequest(
                messages=(),
                sampling=_sampling(body, _or(body.max_tokens, COMPLETION_TOKENS), context.settings),
                n_choices=_or(body.n, 1),
                # The first prompt's seed is the request's, so that an array of one changes nothing.
                seed=(seed + index * 0x9E3779B97F4A7C15) % 2**63,
                palette=_palette(body, context.settings),
                top_logprobs=body.logprobs or 0,
                wants_logprobs=body.logprobs is not None,
                text=text,
                answer_id=answer_id,
                prompt_index=index,
            ),
            context.aligner.backend,
        )
        for index, text in enumerate(prompts(body))
    ]


def prompts(body: CompletionRequest) -> list[str | tuple[int, ...]]:
    """Return the prompts, each a text or its token ids."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [tuple(token for token in given if isinstance(token, int))]
    return [
        one if isinstance(one, str) else tuple(one) for one in given if not isinstance(one, int)
    ]


def _checked(request: AlignmentRequest, backend: Backend) -> AlignmentRequest:
    for feature, param in _needs(request):
        if feature not in backend.features:
            msg = (
                f"the backend of this server cannot do that (it lacks `{feature}`): leave it out, "
                "or ask the operator for another backend"
            )
            raise refusal(param, msg)
    for token, _ in request.sampling.logit_bias:
        _check_token(token, "logit_bias", backend)
    if isinstance(request.text, tuple):
        for token in request.text:
            _check_token(token, "prompt", backend)
    return request


def _needs(request: AlignmentRequest) -> Iterator[tuple[Feature, str]]:
    """Yield what the backend must be able to do, with the field that asks for it."""
    sampling, neutral = request.sampling, SamplingSettings()
    for name, feature in _FEATURES.items():
        if getattr(sampling, name) != getattr(neutral, name):
            yield feature, _PARAMS.get(name, name)
    if request.tools is not None:
        yield "tools", "tools"
    for message in request.messages:
        if message.get("tool_calls") or message["role"] == "tool":
            yield "tools", "messages"
    if request.wants_logprobs:
        yield "logprobs", "logprobs"
    if request.text is not None:
        yield "raw_prompts", "prompt"


_FEATURES: dict[str, Feature] = {
    "top_k": "top_k",
    "min_p": "min_p",
    "presence_penalty": "penalties",
    "frequency_penalty": "penalties",
    "repetition_penalty": "penalties",
    "logit_bias": "logit_bias",
    "json_schema": "json_schema",
}
_PARAMS = {"json_schema": "response_format"}


def _check_token(token: int, param: str, backend: Backend) -> None:
    if token < 0 or (backend.n_vocab is not None and token >= backend.n_vocab):
        msg = f"{token} is no token of this model, whose ids are below {backend.n_vocab}"
        raise refusal(param, msg, "invalid")


def _sampling(
    body: SamplingRequest, max_tokens: int | None, settings: Settings
) -> SamplingSettings:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return SamplingSettings(
        temperature=_or(body.temperature, settings.temperature),
        top_p=_or(body.top_p, settings.top_p),
        top_k=max(0, _or(body.top_k, settings.top_k)),
        max_tokens=_or(max_tokens, settings.max_tokens),
        stop=stop,
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=tuple(sorted((body.logit_bias or {}).items())),
        json_schema=_json_schema(body),
    )


def _json_schema(body: SamplingRequest) -> str | None:
    wanted = body.response_format if isinstance(body, ChatCompletionRequest) else None
    if isinstance(wanted, JsonSchemaFormat):
        return json.dumps(wanted.json_schema.json_schema, ensure_ascii=False)
    if isinstance(wanted, JsonObjectFormat):
        schema = {"type": "object"} if wanted.value is None else wanted.value
        return json.dumps(schema, ensure_ascii=False)
    return None


def _tools(body: ChatCompletionRequest) -> Tools | None:
    if body.tools is None:
        return None
    choice = body.tool_choice or "auto"
    return Tools(
        tuple(tool.model_dump_json(exclude_unset=True) for tool in body.tools),
        choice.function.name if isinstance(choice, NamedToolChoice) else choice,
        _or(body.parallel_tool_calls, True),
    )


def _palette(body: SamplingRequest, settings: Settings) -> PaletteOptions | None:
    if "palette" not in body.model_fields_set and settings.default_palette is not None:
        return PaletteOptions.model_validate(settings.default_palette)
    return body.palette


def _seed(body: SamplingRequest) -> int:
    return secrets.randbits(63) if body.seed is None else body.seed % 2**63


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
