"""From the answers chosen to OpenAI's chat completion, whole and in chunks."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from server.alignment_stages import Aligned
from server.backends.base import Candidate, TokenLogprob
from server.openai_answers import (
    AssistantMessage,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    CompletionTokensDetails,
    FunctionCall,
    LogprobEntry,
    ToolCallEntry,
    TopLogprobEntry,
    Usage,
)

REFUSAL = "No candidate answer clears the floors of the palette."


def completion(
    aligned: Aligned, identity: dict[str, Any], *, wants_logprobs: bool
) -> ChatCompletion:
    """Return the OpenAI object for the answers served."""
    choices = [
        Choice(
            index=index,
            message=_message(one),
            logprobs=ChoiceLogprobs(content=_entries(one.tokens)) if wants_logprobs else None,
            finish_reason=one.finish_reason,
        )
        for index, one in enumerate(aligned.chosen)
    ]
    if not choices:
        message = AssistantMessage(content=None, refusal=REFUSAL)
        choices = [Choice(index=0, message=message, finish_reason="content_filter")]
    return ChatCompletion(
        **identity, choices=choices, usage=usage([aligned]), palette=aligned.report
    )


def usage(answers: Sequence[Aligned]) -> Usage:
    """Return the tokens spent on all answers of a request."""
    n_prompt = sum(aligned.n_prompt_tokens for aligned in answers)
    spent = sum(aligned.spent_tokens for aligned in answers)
    served = [one for aligned in answers for one in aligned.chosen]
    return Usage(
        prompt_tokens=n_prompt,
        completion_tokens=spent,
        total_tokens=n_prompt + spent,
        completion_tokens_details=CompletionTokensDetails(
            rejected_prediction_tokens=spent - sum(one.n_tokens for one in served),
            # How many of an answer's tokens were thinking, no backend says.
            reasoning_tokens=None if any(one.reasoning for one in served) else 0,
        ),
    )


def chunks(whole: ChatCompletion, aligned: Aligned, *, include_usage: bool) -> list[dict[str, Any]]:
    """Return the completion as OpenAI's stream chunks, a delta per token.

    The palette's report is on the last chunk: the usage chunk when usage is asked for.
    """
    head = whole.model_dump(mode="json", exclude={"choices", "usage", "palette"})
    head["object"] = "chat.completion.chunk"
    if include_usage:
        head["usage"] = None
    found: list[dict[str, Any]] = []
    for choice in whole.choices:
        for delta, entries in _deltas(choice, aligned):
            logprobs = None
            if entries is not None and choice.logprobs is not None:
                content = [one.model_dump(mode="json") for one in entries]
                logprobs = {"content": content, "refusal": None}
            part = {"index": choice.index, "delta": delta, "logprobs": logprobs}
            found.append({**head, "choices": [{**part, "finish_reason": None}]})
        last = {"index": choice.index, "delta": {}, "logprobs": None}
        found.append({**head, "choices": [{**last, "finish_reason": choice.finish_reason}]})
    if include_usage:
        found.append({**head, "choices": [], "usage": whole.usage.model_dump(mode="json")})
    if whole.palette is not None:
        found[-1]["palette"] = whole.palette.model_dump(mode="json")
    return found


_Delta = tuple[dict[str, Any], list[LogprobEntry] | None]


def _deltas(choice: Choice, aligned: Aligned) -> list[_Delta]:
    """Return what is added to a message, part by part, with the log-probabilities of each part."""
    message = choice.message
    opening = {"role": "assistant", "content": message.content and "", "refusal": message.refusal}
    deltas: list[_Delta] = [(opening, None)]
    if message.reasoning_content is not None:
        deltas.append(({"reasoning_content": message.reasoning_content}, None))
    entries = choice.logprobs.content if choice.logprobs else []
    if message.content is not None:
        deltas += [
            ({"content": piece}, entries[first:last])
            for piece, first, last in pieces(aligned.chosen[choice.index])
        ]
        entries = []
    for index, call in enumerate(message.tool_calls or []):
        opened = call.model_dump(mode="json")
        opened["function"]["arguments"] = ""
        rest = {"index": index, "function": {"arguments": call.function.arguments}}
        # Tokens of an answer that is nothing but calls go with the first of them.
        deltas.append(({"tool_calls": [{"index": index, **opened}]}, entries or None))
        deltas.append(({"tool_calls": [rest]}, None))
        entries = []
    return deltas


def pieces(candidate: Candidate) -> list[tuple[str, int, int]]:
    """Return the text cut at token borders: (piece, first token, one past the last).

    Tokens that hold parts of one character, or of a text cut by a stop string, do not add up to
    the text; what is left then goes out as one piece. Every token is in one of the pieces.
    """
    text, tokens = candidate.text, candidate.tokens
    found: list[tuple[str, int, int]] = []
    at = 0
    for index, token in enumerate(tokens):
        if not token.token or not text.startswith(token.token, at):
            break
        found.append((token.token, index, index + 1))
        at += len(token.token)
    n_cut = len(found)
    if at < len(text):
        found.append((text[at:], n_cut, len(tokens)))
    elif n_cut < len(tokens):
        piece, first, _ = found.pop() if found else ("", 0, 0)
        found.append((piece, first, len(tokens)))
    return found


def _message(candidate: Candidate) -> AssistantMessage:
    calls = [
        ToolCallEntry(
            id=f"call_{uuid.uuid4().hex[:24]}",
            function=FunctionCall(name=call.name, arguments=call.arguments),
        )
        for call in candidate.tool_calls
    ]
    return AssistantMessage(
        content=candidate.text if candidate.text or not calls else None,
        tool_calls=calls or None,
        reasoning_content=candidate.reasoning or None,
    )


def _entries(tokens: Sequence[TokenLogprob]) -> list[LogprobEntry]:
    return [
        LogprobEntry(
            token=token.token,
            logprob=token.logprob,
            bytes=list(token.token.encode()),
            top_logprobs=[
                TopLogprobEntry(token=other, logprob=logprob, bytes=list(other.encode()))
                for other, logprob in token.top
            ],
        )
        for token in tokens
    ]
