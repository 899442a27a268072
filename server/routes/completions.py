"""``POST /v1/completions``: OpenAI's text completions with a palette.

A prompt is continued as it is, without a chat template. Rewards see it as the user's message and
the continuation as the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.alignment import Aligner
from server.alignment_stages import Aligned, AlignmentRequest, Plan
from server.backends.base import Candidate, ContextLengthError, PromptError
from server.openai_answers import Completion, TextChoice, TextLogprobs
from server.openai_requests import CompletionRequest
from server.routes.chat import identity
from server.routes.chat_answer import pieces, usage
from server.routes.context import InContext, until_client_leaves
from server.routes.parsing import completion_requests, refusal
from server.routes.profiles import with_profile
from server.streaming import streamed

router = APIRouter(tags=["OpenAI"])

# Prompts of one body that are answered at once; more would take the places of other clients.
_AT_ONCE = 4


@router.post("/v1/completions", response_model=Completion)
async def create_completion(
    body: CompletionRequest, request: Request, context: InContext
) -> Response:
    """Continue one or more texts under a palette."""
    asked = body.model
    body = await with_profile(body, context)
    aligner = context.aligner_of(body.model)
    head = identity("cmpl", asked, aligner)
    # Whatever can be refused is refused here, before a stream's status 200 is on its way.
    wanted = completion_requests(body, context, head["id"])
    plans = await until_client_leaves(request, _plan(aligner, wanted))
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return await streamed(
            _run(aligner, plans),
            lambda answers: chunks(answers, body, head, include_usage=include_usage),
            context.settings.keepalive_s,
        )
    answers = await until_client_leaves(request, _run(aligner, plans))
    return JSONResponse(completion(answers, body, head).model_dump(mode="json"))


def completion(
    answers: Sequence[Aligned], body: CompletionRequest, identity: dict[str, Any]
) -> Completion:
    """Return the OpenAI object; choices are numbered through, prompt after prompt."""
    choices = []
    for aligned, index, one in _choices(answers, body.n or 1):
        echo = aligned.prompt.messages[0]["content"] if body.echo else ""
        if one is None:
            choices.append(TextChoice(index=index, text=echo, finish_reason="content_filter"))
            continue
        logprobs = None if body.logprobs is None else _logprobs(one, 0, len(one.tokens))
        choices.append(
            TextChoice(
                index=index,
                text=echo + one.text,
                logprobs=logprobs,
                finish_reason=one.finish_reason,
            )
        )
    reports = [aligned.report for aligned in answers if aligned.report is not None]
    return Completion(
        **identity,
        choices=choices,
        usage=usage(answers),
        palette=(reports[0] if len(answers) == 1 else reports) if reports else None,
    )


def chunks(
    answers: Sequence[Aligned],
    body: CompletionRequest,
    identity: dict[str, Any],
    *,
    include_usage: bool,
) -> list[dict[str, Any]]:
    """Return the completion as OpenAI's stream chunks, one a token; the palette is on the last."""
    whole = completion(answers, body, identity).model_dump(mode="json")
    last = {name: whole.pop(name) for name in ("usage", "palette") if name in whole}
    found: list[dict[str, Any]] = []

    def add(index: int, text: str, logprobs: Any = None, finish_reason: Any = None) -> None:
        choice = {"index": index, "text": text, "logprobs": logprobs}
        found.append({**whole, "choices": [{**choice, "finish_reason": finish_reason}]})
        if include_usage:
            found[-1]["usage"] = None

    for (aligned, index, one), choice in zip(
        _choices(answers, body.n or 1), whole.pop("choices"), strict=True
    ):
        if body.echo:
            add(index, aligned.prompt.messages[0]["content"])
        if one is not None:
            for piece, start, end in pieces(one):
                entries = _logprobs(one, start, end).model_dump()
                add(index, piece, None if body.logprobs is None else entries)
        add(index, "", finish_reason=choice["finish_reason"])
    if include_usage:
        found.append({**whole, "choices": [], "usage": last["usage"]})
    if "palette" in last:
        found[-1]["palette"] = last["palette"]
    return found


async def _plan(aligner: Aligner, wanted: Sequence[AlignmentRequest]) -> list[Plan]:
    try:
        return [await aligner.plan(each) for each in wanted]
    except ContextLengthError as error:
        raise refusal("prompt", str(error), "context_length_exceeded") from error
    except PromptError as error:
        raise refusal("prompt", str(error), "invalid_prompt") from error


async def _run(aligner: Aligner, plans: Sequence[Plan]) -> list[Aligned]:
    """Return the answers of all prompts in order; one failure ends them all."""
    if len(plans) == 1:
        return [await aligner.run(plans[0])]
    places = asyncio.Semaphore(_AT_ONCE)

    async def run(plan: Plan) -> Aligned:
        async with places:
            return await aligner.run(plan)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(plan)) for plan in plans]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _choices(
    answers: Sequence[Aligned], n_choices: int
) -> list[tuple[Aligned, int, Candidate | None]]:
    """Return every choice with its number; None where the palette's floors left nothing."""
    return [
        (aligned, place * n_choices + index, one)
        for place, aligned in enumerate(answers)
        for index, one in enumerate(aligned.chosen or (None,))
    ]


def _logprobs(candidate: Candidate, start: int, end: int) -> TextLogprobs:
    """Return OpenAI's lists for some tokens; offsets count from where the continuation begins."""
    tokens = candidate.tokens
    offset = sum(len(token.token) for token in tokens[:start])
    offsets = []
    for token in tokens[start:end]:
        offsets.append(offset)
        offset += len(token.token)
    return TextLogprobs(
        tokens=[token.token for token in tokens[start:end]],
        token_logprobs=[token.logprob for token in tokens[start:end]],
        top_logprobs=(
            [{**dict(token.top), token.token: token.logprob} for token in tokens[start:end]]
            if any(token.top for token in tokens)
            else None
        ),
        text_offset=offsets,
    )
