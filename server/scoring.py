"""From a candidate to what the rewards see.

Rewards read messages of role and content alone, by turns. Tool use is told in words: a call is a
line ``name(arguments)``, its result a line ``name -> result``, both at the end of the user message
before them. So the last user message holds the question with all that was found out about it, and
templates that want user and assistant by turns get that. An answer that calls tools is its text and
a line for each call. Thinking is no part of an answer: rewards see it only where their template
asks for ``{reasoning}``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rewards import Message, Sample
from server.backends.base import Candidate, Prompt


def sample_of(prompt: Prompt, candidate: Candidate) -> Sample:
    """Return the candidate in its conversation, with the sampler's own log-probabilities.

    They are None, which rewards that read them refuse, when something was sampled without any: an
    empty answer is likely, an unknown one is not. Token ids are given where the model read and
    wrote nothing but the conversation and the answer.
    """
    logprobs = tuple(token.logprob for token in candidate.tokens)
    is_unknown = not logprobs and bool(candidate.text or candidate.tool_calls)
    is_bare = not (prompt.is_raw or candidate.tool_calls or candidate.reasoning)
    is_known = bool(prompt.token_ids) and bool(candidate.token_ids or not candidate.text)
    has_ids = is_bare and is_known
    return Sample(
        messages=plain(prompt.messages),
        answer=answer_text(candidate),
        token_logprobs=None if is_unknown or any(map(math.isnan, logprobs)) else logprobs,
        reasoning=candidate.reasoning,
        prompt_ids=prompt.token_ids if has_ids else None,
        answer_ids=candidate.token_ids if has_ids else None,
    )


def answer_text(candidate: Candidate) -> str:
    """Return the answer as the rewards read it."""
    calls = [f"{call.name}({call.arguments})" for call in candidate.tool_calls]
    return "\n".join([*([candidate.text] if candidate.text or not calls else []), *calls])


def plain(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the conversation in messages of role and content, tool use told in words."""
    told: list[Message] = []
    names: dict[str, str] = {}
    for message in messages:
        calls = message.get("tool_calls", [])
        if message["role"] == "tool":
            name = names.get(message.get("tool_call_id", ""), "tool")
            lines = [f"{name} -> {message['content']}"]
        elif calls:
            lines = [message["content"]] if message["content"] else []
            for call in calls:
                function = call["function"]
                names[call["id"]] = function["name"]
                lines.append(f"{function['name']}({function['arguments']})")
        else:
            told.append(Message(role=message["role"], content=message["content"]))
            continue
        if not told or told[-1]["role"] != "user":
            told.append(Message(role="user", content=""))
        before = told[-1]["content"]
        told[-1]["content"] = "\n".join([*([before] if before else []), *lines])
    return tuple(told)
