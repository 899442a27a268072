"""Engines that end or stand still are noticed and started again, up to a bound; without vLLM."""

from __future__ import annotations

import asyncio
import threading

import pytest

from server.backends.base import BackendUnavailableError, ModelLoadError
from server.backends.vllm_supervisor import Supervisor
from server.backends.vllm_watchdog import watch_for_hangs

PATIENCE_S = 60  # only a hang takes that long


# Restarts


class FakeEngine:
    """An engine that ends when the test says so."""

    def __init__(self, number):
        self.number = number
        self.on_end = None
        self.n_shutdowns = 0

    def watch(self, on_end):
        self.on_end = on_end

    def unwatch(self):
        self.on_end = None

    def reason(self):
        return f"reason {self.number}"

    def shutdown(self):
        self.n_shutdowns += 1


class Starter:
    """Starts fake engines; those whose numbers are in `failing` do not start."""

    def __init__(self, failing=()):
        self.engines = []
        self.n_starts = 0
        self.failing = failing

    def __call__(self):
        self.n_starts += 1
        if self.n_starts in self.failing:
            raise ModelLoadError(f"start {self.n_starts} failed")
        self.engines.append(FakeEngine(self.n_starts))
        return self.engines[-1]


def supervisor(starter, max_restarts=2, **options):
    told = []
    made = Supervisor(
        starter, told.append, max_restarts=max_restarts, **{"backoff_s": 0.0, **options}
    )
    return made, told


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a thread changes it, without an event
            await asyncio.sleep(0.001)


async def test_an_engine_that_ends_is_replaced():
    starter = Starter()
    made, told = supervisor(starter)
    first = await made.start()
    assert made.engine is first
    assert made.health()["state"] == "ok"
    first.on_end()
    assert made.health()["state"] == "failing"
    with pytest.raises(BackendUnavailableError, match="retry"):
        made.engine  # noqa: B018
    await until(lambda: made.health()["state"] == "ok")
    assert made.engine is starter.engines[1]
    assert first.n_shutdowns == 1
    assert len(told) == 1
    assert made.health() == {
        "state": "ok",
        "restarts": 1,
        "gave_up": False,
        "last_error": "reason 1",
    }
    await made.close()
    await made.close()
    assert starter.engines[1].n_shutdowns == 1
    assert made.health()["state"] == "stopped"


async def test_restarts_end_when_they_do_not_help():
    starter = Starter()
    made, told = supervisor(starter, max_restarts=2)
    await made.start()
    for n in range(1, 4):
        await until(lambda n=n: len(starter.engines) == n and starter.engines[-1].on_end)
        starter.engines[-1].on_end()
        await until(lambda n=n: len(told) == n)
    await until(lambda: made.health()["gave_up"])
    assert made.health() == {
        "state": "failing",
        "restarts": 2,
        "gave_up": True,
        "last_error": "reason 3",
    }
    with pytest.raises(BackendUnavailableError, match="operator"):
        made.engine  # noqa: B018
    await made.close()
    assert [engine.n_shutdowns for engine in starter.engines] == [1, 1, 1]


async def test_restarts_that_fail_count():
    starter = Starter(failing={2, 3})
    made, _ = supervisor(starter, max_restarts=3)
    (await made.start()).on_end()
    await until(lambda: made.health()["state"] == "ok")
    assert made.health()["restarts"] == 3
    assert made.health()["last_error"] == "start 3 failed"
    await made.close()


async def test_old_restarts_are_forgotten():
    starter = Starter()
    made, _ = supervisor(starter, max_restarts=1, window_s=0.0)
    await made.start()
    for n in range(1, 5):
        await until(lambda n=n: len(starter.engines) == n and starter.engines[-1].on_end)
        starter.engines[-1].on_end()
    await until(lambda: made.health()["state"] == "ok")
    assert made.health()["restarts"] == 4
    await made.close()


async def test_an_engine_that_starts_while_it_is_closed_is_ended():
    release, starter = threading.Event(), Starter()

    def start():
        if starter.n_starts:
            release.wait(PATIENCE_S)
        return starter()

    made, _ = supervisor(start)
    (await made.start()).on_end()
    await until(lambda: made.health()["restarts"] == 1)
    closing = asyncio.create_task(made.close())
    await asyncio.sleep(0)
    release.set()
    await closing
    assert [engine.n_shutdowns for engine in starter.engines] == [1, 1]


async def test_a_first_start_that_fails_is_told():
    made, _ = supervisor(Starter(failing={1}))
    with pytest.raises(ModelLoadError, match="start 1 failed"):
        await made.start()
    assert made.health()["state"] == "stopped"
    await made.close()


# The watchdog


class Silent:
    """An engine that says something only when it is told to."""

    def __init__(self):
        self.n_outputs = 0
        self.killed_for = None

    def kill(self, reason):
        self.killed_for = reason


class Looks:
    """Time that passes when it is told to: each `look` is one turn of the watchdog."""

    def __init__(self, monkeypatch):
        self._turns = asyncio.Semaphore(0)
        self._asleep = asyncio.Event()
        self.slept = []
        monkeypatch.setattr("server.backends.vllm_watchdog.asyncio.sleep", self._sleep)

    async def _sleep(self, seconds):
        self.slept.append(seconds)
        self._asleep.set()
        await self._turns.acquire()

    async def look(self):
        await self._asleep.wait()
        self._asleep.clear()
        self._turns.release()
        await self._asleep.wait()


async def test_a_silent_engine_with_requests_is_killed_and_the_next_one_watched(monkeypatch):
    looks, engines, n_requests = Looks(monkeypatch), [Silent(), Silent()], 3
    current = engines[0]
    watching = asyncio.create_task(watch_for_hangs(lambda: current, lambda: n_requests, 20.0))
    for _ in range(3):
        await looks.look()
    engines[0].n_outputs += 1  # just in time: it counts from here
    for _ in range(4):
        await looks.look()
        assert engines[0].killed_for is None
    n_requests = 0  # nothing to do is no silence
    for _ in range(9):
        await looks.look()
    n_requests = 1
    for _ in range(4):
        await looks.look()
        assert engines[0].killed_for is None
    await looks.look()
    assert engines[0].killed_for == "no token came from it in 20 s, with 1 requests"
    current = None
    await looks.look()
    current = engines[1]
    for _ in range(4):
        await looks.look()
        assert engines[1].killed_for is None
    await looks.look()
    assert engines[1].killed_for
    assert set(looks.slept) == {5.0}
    watching.cancel()
