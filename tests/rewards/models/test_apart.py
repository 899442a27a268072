"""A scorer that waits for something has threads of its own, and holds up nobody else."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from rewards.base import DirectScorer
from rewards.errors import ScoringError
from tests.rewards.fakes import HeldScorer, sample, suite_of


class Waiting(DirectScorer):
    """Gives 1 once it is let go."""

    n_threads = 2

    def __init__(self, name="slow"):
        super().__init__(name, [name])
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.fails = False

    def identity(self, output):
        return {}

    def score(self, samples):
        self.entered.release()
        if not self.gate.wait(5):
            raise TimeoutError
        if self.fails:
            raise ScoringError(self.name, self.values, "down")
        return np.ones(len(samples))


async def test_a_waiting_scorer_holds_up_nobody_else():
    slow, quick = Waiting(), HeldScorer("quick")
    async with suite_of(slow, quick) as suite:
        first = asyncio.create_task(suite.score([sample("abc")]))
        assert await asyncio.to_thread(slow.entered.acquire, timeout=5)
        async with asyncio.timeout(2):
            np.testing.assert_array_equal(await suite.score([sample("abcd")], ["quick"]), [[4]])
        assert not first.done()
        slow.gate.set()
        np.testing.assert_array_equal(await first, [[1, 3]])


async def test_whichever_of_the_two_fails_the_request_does():
    slow, quick = Waiting(), HeldScorer("quick")
    slow.gate.set()
    async with suite_of(slow, quick) as suite:
        with pytest.raises(ScoringError):
            await suite.score([sample("raise")])
        slow.fails = True
        with pytest.raises(ScoringError, match="down"):
            await suite.score([sample("x")])
        np.testing.assert_array_equal(await suite.score([sample("xy")], ["quick"]), [[2]])
