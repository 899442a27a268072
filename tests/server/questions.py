"""Runs over many questions: prompts, backends that can be stopped or break, what a run keeps."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

from rewards import Message
from server.backends.base import BackendError
from tests.server.fakes import FakeBackend, lexical_rewards


def prompts_of(*texts):
    return [(Message(role="user", content=text),) for text in texts]


def questions(n):
    return prompts_of(*(f"Question {i}" for i in range(n)))


class Slow(FakeBackend):
    """Gives the loop a turn before every candidate: a run can be stopped between any two."""

    async def generate(self, *arguments, **options):
        async for candidate in super().generate(*arguments, **options):
            await asyncio.sleep(0)
            yield candidate


class Breaks(FakeBackend):
    """Fails at one question until it is mended."""

    breaks = True

    async def generate(self, prompt, *arguments, **options):
        if self.breaks and prompt.messages[0]["content"] == "Question 6":
            raise BackendError("broke")
        async for candidate in super().generate(prompt, *arguments, **options):
            yield candidate


@asynccontextmanager
async def started(folder, backend=None):
    """A started backend, and rewards for it."""
    backend = backend or FakeBackend()
    await backend.start()
    async with lexical_rewards(folder) as rewards:
        yield backend, rewards


async def stopped_after(n_turns, work):
    """Run `work` for so many turns of the loop, then cancel it; return whether it ended first."""
    task = asyncio.ensure_future(work)
    for _ in range(n_turns):
        await asyncio.sleep(0)
        if task.done():
            break
    task.cancel()
    return not isinstance((await asyncio.gather(task, return_exceptions=True))[0], BaseException)


def records(path):
    """Return the records of a JSONL file in the order of their prompts."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda record: record["index"])
