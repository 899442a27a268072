"""Files of prompts: JSONL, one conversation a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rewards import Message

Conversation = tuple[Message, ...]


class PromptsError(Exception):
    """A file of prompts that cannot be read; the message has the line and the remedy."""


def parse_prompt(value: object) -> Conversation:
    """Return the conversation of one prompt: a string, a list of messages, or an object of either.

    Raises
    ------
    ValueError
        Saying what a prompt looks like.
    """
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    if isinstance(value, str) and value.strip():
        return (Message(role="user", content=value),)
    if isinstance(value, list) and value:
        conversation = []
        for entry in value:
            if (
                not isinstance(entry, dict)
                or entry.get("role") not in ("system", "user", "assistant")
                or not isinstance(entry.get("content"), str)
            ):
                break
            conversation.append(Message(role=entry["role"], content=entry["content"]))
        else:
            return tuple(conversation)
    msg = (
        'a prompt is a string, {"prompt": "..."} or {"messages": [{"role": "user", '
        '"content": "..."}, ...]}'
    )
    raise ValueError(msg)


def read_prompts(path: Path) -> list[Conversation]:
    """Return the conversations of a JSONL file, one prompt a line; blank lines are passed over.

    Raises
    ------
    PromptsError
        With file, line and remedy.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"prompts {path} cannot be read: {error}"
        raise PromptsError(msg) from error
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(parse_prompt(json.loads(line)))
        except (ValueError, RecursionError) as error:
            msg = f"{path}, line {number}: {error}"
            raise PromptsError(msg) from error
    if not prompts:
        msg = f"{path} holds no prompts: write one JSON string or object a line"
        raise PromptsError(msg)
    return prompts


def hash_of(prompts: Sequence[Conversation]) -> str:
    """Return a hash, in hex, of the texts of all prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
