"""One real server and one fake one for all clients, both with a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import SecretStr

from server.settings import load_settings
from tests.clients.servers import KEY, ObedientBackend, Served, served
from tests.running_server import running_server
from tests.server.fakes import FakeBackend


@pytest.fixture(scope="session")
def real_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of `palette serve` in a process of its own, with the embedded models."""
    state = tmp_path_factory.mktemp("state")
    with running_server(PALETTE_STATE_DIR=str(state), PALETTE_API_KEYS=KEY) as url:
        yield f"{url}/v1"


Serve = Callable[..., Served]


def _serve(stack: ExitStack, folder: Path) -> Serve:
    def serve(backend: FakeBackend | None = None, **changes: Any) -> Served:
        settings = load_settings(
            state_dir=folder / "state", calibrate_at_start=False, api_keys=[SecretStr(KEY)],
            **changes,
        )  # fmt: skip
        return stack.enter_context(served(folder, settings, backend or ObedientBackend()))

    return serve


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers of this test: `serve(backend, **settings)`."""
    with ExitStack() as stack:
        yield _serve(stack, tmp_path)


@pytest.fixture(scope="session")
def able(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose backend can do everything there is to ask for."""
    with ExitStack() as stack:
        yield _serve(stack, tmp_path_factory.mktemp("able"))()


@pytest.fixture(scope="session")
def real(real_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real_url, api_key=KEY, max_retries=0) as client:
        yield client
