"""The app in this process with a fake backend, calibrated; and the client that calls it."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import signal
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from rewards import Message, RewardSuite
from server.alignment import Aligner
from server.app import running_app
from server.backends.base import SamplingSettings
from server.calibration import Calibration
from server.calibrator import calibrate
from server.routes.context import Context
from server.settings import PREFIX, Settings, load_settings
from tests.server.fakes import EVERYTHING, LEXICAL_REWARDS, FakeBackend, lexical_rewards
from tests.server.questions import Slow

# Checks in there, too, tell the values when they fail.
pytest.register_assert_rewrite("tests.server.commands", "tests.server.profile_calls")

# The jobs that a shell starts in the background ignore Ctrl-C, and so would the commands that tests
# start, which are to be stopped by it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give requests without a seed, and what fades from reservoirs, the same chances each time."""
    default_rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=0: default_rng(seed))
    monkeypatch.setattr("server.routes.parsing.secrets.randbits", random.Random(0).getrandbits)


@dataclass
class Running:
    """An app in this process."""

    app: FastAPI
    client: httpx.AsyncClient
    backend: FakeBackend

    @property
    def context(self) -> Context:
        return self.app.state.context

    async def chat(self, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=chat_body(**body))


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Tell me more."}], **fields}


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    """Return the data of a stream's events; it has come to its end."""
    lines = [line for line in reply.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def failed(reply: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Return the message of an error; it is the one that is expected."""
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    return str(error["message"])


@pytest.fixture
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take away what the environment sets, and keep what a command stores out of the home."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PALETTE_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(state_dir=tmp_path / "state", calibrate_at_start=False)


@functools.cache
def fake_calibration() -> Calibration:
    """Return a calibration of the fake backend on 200 prompts x 32 candidates, made once."""

    async def make() -> Calibration:
        backend = FakeBackend()
        with tempfile.TemporaryDirectory() as folder:
            rewards = lexical_rewards(Path(folder))
        await backend.start()
        await rewards.start()
        try:
            return await calibrate(
                backend,
                rewards,
                [(Message(role="user", content="Tell me more."),)] * 200,
                n_candidates=32,
                sampling=SamplingSettings(),
                prompts_source="test",
            )
        finally:
            await rewards.close()

    with ThreadPoolExecutor(1) as pool:  # a loop of its own, whatever loop the test has
        return pool.submit(asyncio.run, make()).result()


@asynccontextmanager
async def run_fake(
    folder: Path,
    settings: Settings,
    backend: FakeBackend | None = None,
    *,
    rewards: RewardSuite | None = None,
    is_calibrated: bool = True,
) -> AsyncIterator[Running]:
    """Run the app on the fake backend."""
    backend = backend or FakeBackend()
    rewards = rewards or lexical_rewards(folder)
    async with running_app(settings, backend=backend, rewards=rewards) as app:
        if is_calibrated:
            app.state.context.aligner.calibration = fake_calibration()
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield Running(app, client, backend)


@pytest.fixture
async def running(tmp_path: Path, settings: Settings) -> AsyncIterator[Running]:
    async with run_fake(tmp_path, settings) as found:
        yield found


@pytest.fixture
async def able(tmp_path: Path, settings: Settings) -> AsyncIterator[Running]:
    """The app with a backend that has every feature."""
    async with run_fake(tmp_path, settings, FakeBackend(features=EVERYTHING)) as found:
        yield found


@pytest.fixture
def rewards_file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.yaml"
    path.write_text(LEXICAL_REWARDS)
    return path


@pytest.fixture
async def aligner(tmp_path: Path, settings: Settings) -> AsyncIterator[Aligner]:
    """The aligner of an app whose backend gives the loop a turn before every candidate."""
    async with run_fake(tmp_path, settings, Slow()) as found:
        yield found.context.aligner
