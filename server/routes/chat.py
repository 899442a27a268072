"""``POST /v1/chat/completions``: OpenAI's chat completions with a palette."""

from __future__ import annotations

import secrets
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from rewards import Message
from server.alignment import Aligned, AlignmentRequest
from server.backends.base import Candidate, SamplingSettings
from server.errors import ModelNotFoundError
from server.routes.context import Context, InContext, until_client_leaves
from server.schemas import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionRequest,
    Choice,
    ChoiceLogprobs,
    CompletionTokensDetails,
    LogprobEntry,
    PaletteOptions,
    TopLogprobEntry,
    Usage,
)
from server.settings import Settings
from server.streaming import stream

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, context: InContext
) -> Response:
    """Answer a conversation under a palette."""
    check_model(body.model, context)
    wanted = alignment_request(body, context.settings)
    aligner = context.aligner
    # Whatever can be refused is refused here, before a stream's status 200 is on its way.
    plan = await until_client_leaves(request, aligner.plan(wanted))
    identity = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            stream(
                aligner.run(plan),
                lambda aligned: chunks(
                    completion(aligned, body, identity), aligned, include_usage=include_usage
                ),
                context.settings.keepalive_s,
            ),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    aligned = await until_client_leaves(request, aligner.run(plan))
    return JSONResponse(_json(completion(aligned, body, identity)))


def check_model(name: str, context: Context) -> None:
    """Raise `ModelNotFoundError` unless `name` is the model served here."""
    served = context.aligner.backend.model_id
    if name != served:
        msg = f"The model `{name}` does not exist here; this server has `{served}`."
        raise ModelNotFoundError(msg)


def alignment_request(body: ChatCompletionRequest, settings: Settings) -> AlignmentRequest:
    """Return what the body asks for, with the operator's defaults filled in."""
    palette = body.palette
    if "palette" not in body.model_fields_set and settings.default_palette is not None:
        palette = PaletteOptions.model_validate(settings.default_palette)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return AlignmentRequest(
        messages=tuple(
            # `developer` is OpenAI's newer word for `system`, which chat templates know.
            Message(
                role="system" if message.role == "developer" else message.role,
                content=message.text(),
            )
            for message in body.messages
        ),
        sampling=SamplingSettings(
            temperature=_or(body.temperature, settings.temperature),
            top_p=_or(body.top_p, settings.top_p),
            top_k=_or(body.top_k, settings.top_k),
            max_tokens=_or(body.max_completion_tokens, _or(body.max_tokens, settings.max_tokens)),
            stop=tuple(text for text in stop if text),
        ),
        n_choices=_or(body.n, 1),
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        palette=palette,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else 0,
    )


def completion(
    aligned: Aligned, body: ChatCompletionRequest, identity: dict[str, Any]
) -> ChatCompletion:
    """Return the OpenAI object for the answers served."""
    choices = [
        Choice(
            index=index,
            message=AssistantMessage(content=one.text),
            logprobs=_logprobs(one) if body.logprobs else None,
            finish_reason=one.finish_reason,
        )
        for index, one in enumerate(aligned.chosen)
    ]
    if not choices:
        refusal = "No candidate answer clears the floors of the palette."
        message = AssistantMessage(content=None, refusal=refusal)
        choices = [Choice(index=0, message=message, finish_reason="content_filter")]
    n_prompt, spent = len(aligned.prompt.token_ids), aligned.spent_tokens
    served = sum(one.n_tokens for one in aligned.chosen)
    return ChatCompletion(
        **identity,
        choices=choices,
        usage=Usage(
            prompt_tokens=n_prompt,
            completion_tokens=spent,
            total_tokens=n_prompt + spent,
            completion_tokens_details=CompletionTokensDetails(
                rejected_prediction_tokens=spent - served
            ),
        ),
        palette=aligned.report,
    )


def chunks(whole: ChatCompletion, aligned: Aligned, *, include_usage: bool) -> list[dict[str, Any]]:
    """Return the completion as OpenAI's stream chunks, a delta per token.

    The palette's report is on the last chunk: the usage chunk when usage is asked for.
    """
    head = {
        "id": whole.id,
        "object": "chat.completion.chunk",
        "created": whole.created,
        "model": whole.model,
    }
    if include_usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**head, "choices": [{**choice, **fields}]}

    found: list[dict[str, Any]] = []
    for choice in whole.choices:
        role = {"role": "assistant", "content": "", "refusal": choice.message.refusal}
        found.append(chunk(choice.index, role))
        if choice.message.content:
            entries = choice.logprobs.content if choice.logprobs else None
            for piece, first, last in _pieces(aligned.chosen[choice.index]):
                fields = (
                    {"logprobs": {"content": _json_list(entries[first:last]), "refusal": None}}
                    if entries is not None
                    else {}
                )
                found.append(chunk(choice.index, {"content": piece}, **fields))
        found.append(chunk(choice.index, {}, finish_reason=choice.finish_reason))
    report = None if whole.palette is None else _json(whole.palette)
    if include_usage:
        found.append({**head, "choices": [], "usage": _json(whole.usage)})
    if report is not None:
        found[-1]["palette"] = report
    return found


def _pieces(candidate: Candidate) -> list[tuple[str, int, int]]:
    """Return the text cut at token borders: (piece, first token, one past the last).

    Tokens that hold parts of one character, or of a text cut by a stop string, do not add up to
    the text; what is left then goes out as one piece.
    """
    pieces: list[tuple[str, int, int]] = []
    at = 0
    for index, token in enumerate(candidate.tokens):
        if not token.token or not candidate.text.startswith(token.token, at):
            pieces.append((candidate.text[at:], index, len(candidate.tokens)))
            break
        pieces.append((token.token, index, index + 1))
        at += len(token.token)
    else:
        if at < len(candidate.text):
            end = len(candidate.tokens)
            pieces.append((candidate.text[at:], end, end))
    return [piece for piece in pieces if piece[0]]


def _logprobs(candidate: Candidate) -> ChoiceLogprobs:
    return ChoiceLogprobs(
        content=[
            LogprobEntry(
                token=token.token,
                logprob=token.logprob,
                bytes=list(token.token.encode()),
                top_logprobs=[
                    TopLogprobEntry(token=other, logprob=logprob, bytes=list(other.encode()))
                    for other, logprob in token.top
                ],
            )
            for token in candidate.tokens
        ]
    )


def _json(model: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = model.model_dump(mode="json")
    if dumped.get("palette", ...) is None:
        del dumped["palette"]  # a plain answer looks exactly like OpenAI's
    return dumped


def _json_list(models: list[LogprobEntry]) -> list[dict[str, Any]]:
    return [model.model_dump(mode="json") for model in models]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
