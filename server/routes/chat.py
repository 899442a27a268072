"""``POST /v1/chat/completions``: OpenAI's chat completions with a palette."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.alignment import Aligner
from server.openai_answers import ChatCompletion
from server.openai_requests import ChatCompletionRequest
from server.routes.chat_answer import chunks, completion
from server.routes.context import InContext, until_client_leaves
from server.routes.parsing import chat_request
from server.routes.profiles import with_profile
from server.streaming import streamed

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, context: InContext
) -> Response:
    """Answer a conversation under a palette."""
    asked = body.model
    body = await with_profile(body, context)
    aligner = context.aligner_of(body.model)
    head = identity("chatcmpl", asked, aligner)
    # Whatever can be refused is refused here, before a stream's status 200 is on its way.
    wanted = chat_request(body, context, head["id"])
    plan = await until_client_leaves(request, aligner.plan(wanted))
    if body.service_tier is not None:
        head["service_tier"] = "default"
    wants_logprobs = bool(body.logprobs)
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return await streamed(
            aligner.run(plan),
            lambda aligned: chunks(
                completion(aligned, head, wants_logprobs=wants_logprobs),
                aligned,
                include_usage=include_usage,
            ),
            context.settings.keepalive_s,
        )
    aligned = await until_client_leaves(request, aligner.run(plan))
    whole = completion(aligned, head, wants_logprobs=wants_logprobs)
    return JSONResponse(whole.model_dump(mode="json"))


def identity(kind: str, model: str, aligner: Aligner) -> dict[str, Any]:
    """Return the fields that every answer and each of its chunks begin with."""
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        # With a seed, what tells a client why an answer is another one.
        "system_fingerprint": f"fp_{aligner.backend.fingerprint[:12]}",
    }
