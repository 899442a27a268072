"""The servers that clients are pointed at: in a thread, so that clients of any kind can block."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from server.backends.base import Candidate, Prompt, SamplingSettings, ToolCall
from server.settings import Settings
from tests.server.conftest import Running
from tests.server.fakes import EVERYTHING, FakeBackend
from tests.server.test_disconnect import listening

KEY = "sk-clients-0123456789"
MODEL = "fake"
QUESTION = [{"role": "user", "content": "Find a word."}]
#: What the fake backend reaches with eight candidates, and what it never does.
SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 8}
FAR = {"targets": {"words": {"at_most": 0.5}}, "candidates": 4}
WAIT_S = 20.0

T = TypeVar("T")


class ObedientBackend(FakeBackend):
    """A fake that can do everything, and fills schemas in from what the conversation says.

    Every candidate calls the first tool until the last message is a tool's; numbers are taken from
    the last message, for a client's own suite asks for `magic_function(3)` and looks for the 3.
    """

    def __init__(self, *, hold: bool = False) -> None:
        super().__init__(hold=hold, features=EVERYTHING, max_context=4096)

    def _shaped(self, drawn: Candidate, prompt: Prompt, sampling: SamplingSettings) -> Candidate:
        said = prompt.messages[-1]["content"]
        if sampling.json_schema is not None:
            schema = json.loads(sampling.json_schema)
            return replace(drawn, text=json.dumps(filled(schema, said)))
        tools = prompt.tools
        if tools is None or tools.choice == "none":
            return drawn
        if tools.choice == "auto" and prompt.messages[-1]["role"] == "tool":
            return drawn
        definitions = [json.loads(each)["function"] for each in tools.definitions]
        named = [each for each in definitions if each["name"] == tools.choice]
        called = (named or definitions)[0]
        arguments = json.dumps(filled(called.get("parameters", {}), said))
        calls = (ToolCall(called["name"], arguments),)
        return replace(drawn, text="", tool_calls=calls, finish_reason="tool_calls")


def filled(schema: dict[str, Any], said: str, root: dict[str, Any] | None = None) -> Any:
    """Return a value that the schema allows."""
    root = schema if root is None else root
    if "$ref" in schema:
        return filled(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], said, root)
    if "enum" in schema or "const" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    if "anyOf" in schema:
        return filled(schema["anyOf"][0], said, root)
    match schema.get("type", "object"):
        case "object":
            properties = schema.get("properties", {})
            return {name: filled(each, said, root) for name, each in properties.items()}
        case "array":
            return [filled(schema.get("items", {"type": "string"}), said, root)]
        case "integer" | "number":
            return int((re.findall(r"\d+", said) or ["0"])[0])
        case "boolean":
            return True
        case _:
            return said or "word"


@dataclass
class Served:
    """A server in a thread: its address, its parts, and the way into its loop."""

    url: str
    running: Running
    loop: asyncio.AbstractEventLoop

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def backend(self) -> FakeBackend:
        return self.running.backend

    def inside(self, act: Callable[[], T]) -> T:
        """Return what `act` gives in the server's own thread, where its state may be touched."""

        async def call() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(WAIT_S)

    def until(self, condition: Callable[[], object]) -> None:
        """Return once `condition` holds there."""

        async def wait() -> None:
            async with asyncio.timeout(WAIT_S):
                while not condition():  # noqa: ASYNC110  # there is no event to wait for
                    await asyncio.sleep(0.005)

        asyncio.run_coroutine_threadsafe(wait(), self.loop).result(WAIT_S + 1)


@contextmanager
def served(folder: Path, settings: Settings, backend: FakeBackend) -> Iterator[Served]:
    """Run the app behind uvicorn in a thread of its own."""
    started: Future[Served] = Future()
    stop = asyncio.Event()

    async def serve() -> None:
        try:
            async with listening(folder, settings, backend) as (running, port):
                loop = asyncio.get_running_loop()
                started.set_result(Served(f"http://127.0.0.1:{port}", running, loop))
                await stop.wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="served")
    thread.start()
    try:
        found = started.result(60)
        yield found
    finally:
        if started.done() and started.exception() is None:
            started.result().loop.call_soon_threadsafe(stop.set)
        thread.join()
