"""Engines that are killed, stand still, cannot start, or lose their server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from server.backends.base import BackendUnavailableError, ModelLoadError
from server.backends.vllm_engine import VllmEngineBackend
from tests.server.backends.hf_drawing import same
from tests.server.backends.vllm_engine.conftest import (
    ENGINE,
    MODEL,
    PATIENCE_S,
    QUESTION,
    collect,
    is_alive,
    never_ending,
    until,
)

pytestmark = ENGINE
ROOT = Path(__file__).parents[4]


def family(pid):
    """Return a process and all that it started, in turn."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def shared_memory(pids):
    """Return the files by which processes share memory, which outlive who forgets them."""
    mapped = [Path(f"/proc/{pid}/maps").read_text().splitlines() for pid in pids]
    return {
        Path(line.split(maxsplit=5)[5]) for lines in mapped for line in lines if "/dev/shm/" in line
    }


@pytest.fixture
def temporary(monkeypatch):
    """Return a temporary folder of our own, its name short enough for sockets."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


async def serving(backend):
    await until(lambda: backend.health()["state"] == "ok")


async def test_a_killed_engine_fails_its_requests_and_comes_back(backend):
    expected = await collect(backend, n=4, seed=9)
    restarts = backend.health()["restarts"]
    prompt = await backend.render(QUESTION)
    llm = backend._supervisor.engine.llm

    async def ask(seed):
        return [c async for c in backend.generate(prompt, 4, never_ending(), seed)]

    asking = [asyncio.create_task(ask(seed)) for seed in range(8)]
    await until(lambda: llm.get_num_unfinished_requests() == 32)
    (pid,) = backend.health()["pids"]
    all_pids = family(pid)
    held = shared_memory([*all_pids, os.getpid()])
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(result) for result in results} == {BackendUnavailableError}
    assert "killed?" in backend.health()["last_error"]
    assert backend.health()["state"] == "failing"
    with pytest.raises(BackendUnavailableError, match="retry"):
        await collect(backend)
    await serving(backend)
    assert not any(is_alive(one) for one in all_pids)
    now = shared_memory([os.getpid(), *family(backend.health()["pids"][0])])
    assert not any(path.exists() for path in held - now)
    assert backend.health()["restarts"] == restarts + 1
    assert same(await collect(backend, n=4, seed=9), expected)


async def test_an_engine_that_stands_still_is_replaced():
    backend = VllmEngineBackend(
        MODEL, n_threads=1, engine_args={"kv_cache_memory_bytes": 2**26}, timeout_s=8.0
    )
    await backend.start()
    expected = await collect(backend, n=4, seed=9)
    (pid,) = backend.health()["pids"]
    all_pids = family(pid)
    prompt = await backend.render(QUESTION)
    llm = backend._supervisor.engine.llm

    async def ask(seed):
        return [c async for c in backend.generate(prompt, 4, never_ending(), seed)]

    asking = [asyncio.create_task(ask(seed)) for seed in range(4)]
    await until(lambda: llm.get_num_unfinished_requests() == 16)
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(result) for result in results} == {BackendUnavailableError}
    assert "no token came from it in 8 s, with 4 requests" in backend.health()["last_error"]
    await serving(backend)
    assert not any(is_alive(one) for one in all_pids)
    assert backend.health()["restarts"] == 1
    assert same(await collect(backend, n=4, seed=9), expected)
    # Nor does one that stands still outlive the server.
    (pid,) = backend.health()["pids"]
    all_pids = family(pid)
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(PATIENCE_S):
        await backend.close()
    assert not any(is_alive(one) for one in all_pids)


async def test_a_killed_server_leaves_no_engine_and_a_failing_start_says_why(backend, temporary):
    """Two starts at once, for the time they take."""
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.server.backends.vllm_engine.victim",
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    hopeless = VllmEngineBackend(MODEL, n_threads=1, engine_args={"kv_cache_memory_bytes": 10**5})
    with pytest.raises(ModelLoadError, match="No available memory for the cache blocks"):
        await hopeless.start()
    await hopeless.close()
    async with asyncio.timeout(PATIENCE_S):
        (pid,) = json.loads(await victim.stdout.readline())
        assert is_alive(pid)
        assert len(list(temporary.glob("palette-engine-*"))) == 1
        victim.kill()
        await victim.wait()
    await until(lambda: not is_alive(pid))
    assert not list(temporary.glob("palette-engine-*"))


async def test_a_refused_option_is_told_before_anything_is_loaded(backend):
    with pytest.raises(ModelLoadError, match="did you mean max_num_seqs"):
        await VllmEngineBackend(MODEL, engine_args={"max-num-seq": 4}).start()
    with pytest.raises(ModelLoadError, match="nonsense"):
        await VllmEngineBackend(MODEL, engine_args={"quantization": "nonsense"}).start()
