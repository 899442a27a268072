"""What goes wrong in one scorer: its own requests fail, all others are answered."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

from rewards import RewardError, RewardQueueFullError, ScoringError
from rewards.base import TRIAL, DirectScorer
from rewards.budget import is_out_of_memory
from tests.rewards.fakes import HeldScorer, sample, suite_of
from tests.rewards.test_suite import entered, queued

TIMEOUT_S = 1.0  # long enough for a pass that is not held, on a busy machine


async def until(condition):
    """Wait for another thread."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def scored(suite, text, *names):
    return asyncio.create_task(suite.score([sample(text)], names or None))


class HeldDirect(DirectScorer):
    """Scores 1, on threads of its own; a text that holds "hang" waits for the gate."""

    def __init__(self, name="direct", n_threads=1):
        super().__init__(name, [name])
        self.n_threads = n_threads
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.failure = None

    def identity(self, output):
        return {"kind": "direct"}

    def trial(self):
        return TRIAL

    def score(self, samples):
        if any("hang" in sample.answer for sample in samples):
            self.entered.release()
            assert self.gate.wait(20), "the test never opened the gate"
        if self.failure:
            raise ScoringError(self.name, self.values, self.failure)
        return np.ones(len(samples))


async def test_a_hung_pass_fails_its_scorer_alone_until_it_ends():
    hung, other = HeldScorer("hung", is_held=True), HeldScorer("other")
    async with suite_of(hung, other, timeout_s=TIMEOUT_S) as suite:
        first = scored(suite, "abc", "hung")
        await entered(hung)
        behind = scored(suite, "abcd", "hung")
        neighbour = scored(suite, "abcde", "other")
        for task in (first, behind):
            with pytest.raises(ScoringError, match=r"'hung'.*it hangs: .* more than 1 s") as caught:
                await task
            assert caught.value.scorer == "hung"
        np.testing.assert_array_equal(await neighbour, [[5]])
        with pytest.raises(ScoringError, match="serves nobody"):  # at once: nothing is tried
            await suite.score([sample("x")])
        assert hung.batches == [[3]]
        assert suite.health()["hung"]["state"] == "hung"
        assert suite.health()["other"]["state"] == "ok"
        hung.gate.set()
        await until(lambda: suite.health()["hung"]["state"] != "hung")
        np.testing.assert_array_equal(await suite.score([sample("xy")]), [[2, 2]])
        assert suite.health()["hung"]["state"] == "ok"


async def test_two_scorers_hang_and_the_third_is_served():
    one, two, three = (
        HeldScorer(name, is_held=name != "three") for name in ("one", "two", "three")
    )
    async with suite_of(one, two, three, timeout_s=TIMEOUT_S) as suite:
        tasks = [scored(suite, "abc", scorer.name) for scorer in (one, two)]
        for task in tasks:
            with pytest.raises(ScoringError, match="hangs"):
                await task
        np.testing.assert_array_equal(await scored(suite, "abc", "three"), [[3]])
        one.gate.set()
        two.gate.set()


async def test_a_hung_call_fails_its_scorer_alone_until_it_ends():
    hung, other = HeldDirect(), HeldScorer("other")
    async with suite_of(hung, other, timeout_s=TIMEOUT_S) as suite:
        first = scored(suite, "hang", "direct")
        await entered(hung)
        behind = scored(suite, "behind", "direct")
        np.testing.assert_array_equal(await scored(suite, "abc", "other"), [[3]])
        for task in (first, behind):
            with pytest.raises(ScoringError, match=r"'direct'.*hangs"):
                await task
        assert suite.health()["direct"]["state"] == "hung"
        with pytest.raises(ScoringError, match="hangs"):
            await suite.score([sample("abc")])
        hung.gate.set()
        await until(lambda: suite.health()["direct"]["state"] == "ok")
        np.testing.assert_array_equal(await suite.score([sample("abc")]), [[1, 3]])


async def test_a_hung_call_is_given_up_though_its_caller_has_left():
    hung = HeldDirect(n_threads=2)
    async with suite_of(hung, timeout_s=TIMEOUT_S) as suite:
        for _ in range(2):
            task = scored(suite, "hang")
            await entered(hung)
            task.cancel()
        with pytest.raises(ScoringError, match="hangs"):
            await suite.score([sample("abc")])
        hung.gate.set()
        await until(lambda: suite.health()["direct"]["state"] == "ok")


async def test_closing_fails_the_calls_that_wait():
    direct = HeldDirect()
    suite = suite_of(direct)
    await suite.start()
    running = scored(suite, "hang")
    await entered(direct)
    waiting = scored(suite, "abc")
    await until(lambda: suite._runner._lanes["direct"]._calls)
    closing = asyncio.create_task(suite.close())
    with pytest.raises(RewardError, match="closed"):
        await waiting
    direct.gate.set()
    await asyncio.gather(running, closing, return_exceptions=True)


async def test_one_thread_hangs_and_the_other_serves():
    hung = HeldDirect(n_threads=2)
    async with suite_of(hung, timeout_s=TIMEOUT_S) as suite:
        task = scored(suite, "hang")
        await entered(hung)
        for _ in range(3):
            np.testing.assert_array_equal(await suite.score([sample("abc")]), [[1]])
        with pytest.raises(ScoringError, match="hangs"):
            await task
        assert suite.health()["direct"]["state"] == "ok"
        np.testing.assert_array_equal(await suite.score([sample("abc")]), [[1]])
        hung.gate.set()


async def test_a_batch_that_does_not_fit_is_split_until_it_does():
    scorer = HeldScorer(is_held=True)
    scorer.memory = 12
    async with suite_of(scorer, max_batch_tokens=1000) as suite:
        first = scored(suite, "abc")
        await entered(scorer)
        tasks = [scored(suite, f"{i:04}") for i in range(16)]
        await queued(suite, 16)
        scorer.gate.set()
        assert [(await task).item() for task in tasks] == [4] * 16
        await first
        assert scorer.batches[:4] == [[3], [4] * 16, [4] * 8, [4] * 4]
        assert all(sum(batch) <= 12 for batch in scorer.batches[4:])
        assert suite.health()["length"]["state"] == "ok"


async def test_an_input_that_does_not_fit_alone_fails_alone():
    scorer = HeldScorer(is_held=True)
    scorer.memory = 20
    async with suite_of(scorer, max_batch_tokens=1000) as suite:
        first = scored(suite, "abc")
        await entered(scorer)
        large = scored(suite, "x" * 30)
        small = [scored(suite, str(i) * 29) for i in range(3)] + [scored(suite, "y" * 20)]
        await queued(suite, 5)
        scorer.gate.set()
        for task in (large, *small[:3]):
            with pytest.raises(ScoringError, match="can't allocate memory"):
                await task
        np.testing.assert_array_equal(await small[3], [[20]])
        await first


async def test_the_size_comes_back_after_memory_did():
    scorer = HeldScorer(is_held=True)
    async with suite_of(scorer, max_batch_tokens=400, cache_entries=0) as suite:

        async def burst():
            """Score 100 texts of 4 letters that wait together; return the batches."""
            scorer.gate.clear()
            n_before = len(scorer.batches)
            first = scored(suite, "first")
            await entered(scorer)
            while scorer.entered.acquire(blocking=False):
                pass
            tasks = [scored(suite, f"{i:04}") for i in range(100)]
            await queued(suite, 100)
            scorer.gate.set()
            await asyncio.gather(first, *tasks)
            while scorer.entered.acquire(blocking=False):
                pass
            return scorer.batches[n_before + 1 :]

        assert await burst() == [[4] * 100]
        scorer.memory = 100
        sizes = [sum(batch) for batch in await burst()]
        assert sizes[:2] == [400, 200]
        assert sum(size > 100 for size in sizes) <= 3, "it is not tried again and again"
        scorer.memory = 10**9
        for _ in range(64):
            last = await burst()
        assert last == [[4] * 100]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("device on fire"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_memory):
    assert is_out_of_memory(error) is is_memory


def test_torchs_own_words_for_no_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


async def test_a_wrong_shape_fails_its_batch_and_no_other():
    scorer = HeldScorer()
    async with suite_of(scorer) as suite:
        with pytest.raises(ScoringError, match=r"shape \(1, 2\) came back for 1 inputs"):
            await suite.score([sample("shape")])
        np.testing.assert_array_equal(await suite.score([sample("fine")]), [[4]])


@pytest.mark.parametrize("fault", ["raise", "nan", "shape", "encode", "template"])
async def test_values_that_may_fail_are_missing_and_the_others_there(fault):
    class Broken(HeldScorer):
        def render(self, sample):
            return super().render(sample) if "fine" not in sample.answer else broken(sample)

    def broken(given):
        return HeldScorer.render(scorer, sample(fault if given.answer == "fine" else "good"))

    scorer, other = Broken("broken"), HeldScorer("other")
    async with suite_of(scorer, other, HeldDirect()) as suite:
        found = await suite.attempt([sample("fine"), sample("fine too")], {"broken", "direct"})
        assert list(found.failures) == ["broken"]
        assert "scorer 'broken' (feeds broken): " in found.failures["broken"]
        np.testing.assert_array_equal(found.rewards[:, 1:], [[4, 1], [8, 1]])
        assert np.isnan(found.rewards[:, 0]).all()
        with pytest.raises(ScoringError, match="broken"):
            await suite.attempt([sample("fine")], {"other"})


async def test_a_hung_value_that_may_fail_is_missing():
    hung, direct = HeldScorer("hung", is_held=True), HeldDirect()
    async with suite_of(hung, direct, HeldScorer("other"), timeout_s=TIMEOUT_S) as suite:
        found = await suite.attempt([sample("hang")], {"hung", "direct"})
        assert set(found.failures) == {"hung", "direct"}
        assert found.rewards[0, 2] == 4
        hung.gate.set()
        direct.gate.set()


async def test_more_texts_than_may_wait_are_refused():
    scorer = HeldScorer(is_held=True)
    async with suite_of(scorer, queue_tokens=40) as suite:
        first = scored(suite, "x" * 90)  # 31 by the estimate; alone, anything finds room
        await entered(scorer)
        second = scored(suite, "y" * 21)
        await queued(suite, 1)
        with pytest.raises(RewardQueueFullError, match=r"2 texts .* about 39 tokens, and 40 may"):
            await suite.score([sample("z" * 6)])
        np.testing.assert_array_equal(
            await asyncio.gather(scored(suite, "y" * 21), _open(scorer)), [[[21]], [[0]]]
        )  # what is in flight already takes no room
        await asyncio.gather(first, second)
        np.testing.assert_array_equal(await suite.score([sample("z" * 6)]), [[6]])
        assert suite._runner.batcher._n_tokens == 0


async def _open(scorer):
    scorer.gate.set()
    return [[0]]


async def test_cancelled_texts_leave_room():
    scorer = HeldScorer(is_held=True)
    async with suite_of(scorer, queue_tokens=40) as suite:
        first = scored(suite, "x" * 90)
        await entered(scorer)
        leaving = scored(suite, "y" * 21)
        await queued(suite, 1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        staying = scored(suite, "z" * 21)
        await queued(suite, 1)
        scorer.gate.set()
        await asyncio.gather(first, staying)
        assert suite._runner.batcher._n_tokens == 0


@pytest.fixture
def _quick_trials(monkeypatch):
    monkeypatch.setattr("rewards.trials.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("rewards.trials.LONGEST_PAUSE_S", 0.001)


@pytest.mark.usefixtures("_quick_trials")
async def test_a_text_that_fails_does_not_make_its_scorer_fail_for_good():
    async with suite_of(HeldScorer()) as suite:
        with pytest.raises(ScoringError):
            await suite.score([sample("nan")])
        await until(lambda: suite.health()["length"]["state"] == "ok")
        assert suite.health()["length"]["persists"] is False
        assert suite.health()["length"]["texts"] == 2  # the trial's is one


@pytest.mark.usefixtures("_quick_trials")
async def test_a_scorer_that_is_down_persists_and_recovers_without_traffic():
    scorer = HeldDirect()
    async with suite_of(scorer) as suite:
        scorer.failure = "cannot be reached"
        with pytest.raises(ScoringError):
            await suite.score([sample("abc")])
        await until(lambda: suite.health()["direct"]["persists"])
        assert suite.health()["direct"]["state"] == "failing"
        assert "cannot be reached" in suite.health()["direct"]["last_error"]
        scorer.failure = None
        await until(lambda: suite.health()["direct"]["state"] == "ok")
        assert suite.health()["direct"]["persists"] is False


async def test_small_batches_linger_until_the_last_of_some_answer():
    """On a GPU; without a moment to wait for, only the last candidate makes them leave."""
    scorer = HeldScorer()
    scorer.linger_s = 3600.0
    async with suite_of(scorer, max_batch_tokens=1000) as suite:
        early = [
            asyncio.create_task(suite.score([sample(f"a{i}")], more=True)) for i in range(3)
        ] + [asyncio.create_task(suite.score([sample("b")], more=True))]
        await queued(suite, 4)
        assert scorer.batches == []
        await suite.score([sample("last")])
        await asyncio.gather(*early)
        assert scorer.batches == [[1, 2, 2, 2, 4]]
        waiting = asyncio.create_task(suite.score([sample("c")], more=True))
        await queued(suite, 1)
        await suite.score([sample("last")])  # known already: it has no batch of its own
        await waiting
        full = [
            asyncio.create_task(suite.score([sample(f"{i:0100}")], more=True)) for i in range(10)
        ]
        await asyncio.gather(*full)  # a full batch waits for nobody


async def test_lingering_ends_by_itself():
    scorer = HeldScorer()
    scorer.linger_s = 0.01
    async with suite_of(scorer) as suite:
        np.testing.assert_array_equal(await suite.score([sample("abc")], more=True), [[3]])
