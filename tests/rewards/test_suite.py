"""The batcher and its threads, through the suite, with a scorer that can be held."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from rewards import RewardError, ScoringError
from tests.rewards.fakes import HeldScorer, sample, suite_of


async def entered(scorer, n=1):
    """Wait until n more forward passes have begun."""
    for _ in range(n):
        assert await asyncio.to_thread(scorer.entered.acquire, timeout=20)


async def queued(suite, n):
    """Wait until n inputs wait for the device."""
    async with asyncio.timeout(20):
        while suite._runner.batcher.worker.n_queued != n:  # noqa: ASYNC110 - another thread fills it
            await asyncio.sleep(0.001)


async def test_order_is_kept():
    async with suite_of(HeldScorer(), max_batch_tokens=200) as suite:
        lengths = np.random.default_rng(0).permutation(np.arange(1, 100))
        scores = await suite.score([sample("x" * n) for n in lengths])
    np.testing.assert_array_equal(scores, lengths[:, None])


async def test_requests_in_flight_share_batches():
    scorer = HeldScorer(is_held=True)
    async with suite_of(scorer, max_batch_tokens=1000) as suite:
        first = asyncio.create_task(suite.score([sample("first")]))
        await entered(scorer)
        others = [
            asyncio.create_task(suite.score([sample(f"{i:02}{j:02}") for j in range(3)]))
            for i in range(20)
        ]
        await queued(suite, 60)
        scorer.gate.set()
        results = await asyncio.gather(first, *others)
    assert scorer.batches == [[5], [4] * 60]  # two forward passes for 21 requests
    assert [r.shape for r in results] == [(1, 1)] + [(3, 1)] * 20


async def test_the_budget_is_never_exceeded():
    scorer = HeldScorer(max_length=60)
    rng = np.random.default_rng(1)
    async with suite_of(scorer, max_batch_tokens=120) as suite:
        await asyncio.gather(
            *(
                suite.score([sample(f"{i}-{j}-".ljust(n, "x")) for j, n in enumerate(lengths)])
                for i, lengths in enumerate(rng.integers(8, 61, (15, 8)))
            )
        )
    assert sum(map(len, scorer.batches)) == 120
    assert max(max(batch) * len(batch) for batch in scorer.batches) <= 120


async def test_equal_inputs_are_scored_once():
    scorer = HeldScorer(is_held=True)
    async with suite_of(scorer) as suite:
        tasks = [asyncio.create_task(suite.score([sample("same")] * 3)) for _ in range(4)]
        await entered(scorer)
        scorer.gate.set()
        for scores in await asyncio.gather(*tasks):
            np.testing.assert_array_equal(scores, [[4], [4], [4]])
        await suite.score([sample("same"), sample("other")])
        assert scorer.batches == [[4], [5]]
        health = suite.health()["length"]
        assert (health["texts"], health["duplicates"]) == (2, 12)


async def test_the_cache_is_bounded_and_may_be_off():
    for cache_entries, n_scored in ((2, 5), (0, 6)):
        scorer = HeldScorer()
        async with suite_of(scorer, cache_entries=cache_entries) as suite:
            for text in ("one", "two", "one", "three", "two", "one")[: 5 + (cache_entries == 0)]:
                await suite.score([sample(text)])
        # of two places: one, two | one known | three drops two | two again drops one
        assert sum(map(len, scorer.batches)) == n_scored - (cache_entries == 2)


async def test_a_failed_batch_fails_its_requests_and_no_other():
    scorer = HeldScorer(is_held=True)
    other = HeldScorer("other")
    async with suite_of(scorer, other, max_batch_tokens=100) as suite:
        bad = asyncio.create_task(suite.score([sample("raise"), sample("x" * 90)]))
        await entered(scorer)
        neighbour = asyncio.create_task(suite.score([sample("y" * 88)]))
        scorer.gate.set()
        with pytest.raises(ScoringError, match=r"'length'.*device on fire") as caught:
            await bad
        assert (caught.value.scorer, caught.value.values) == ("length", ("length",))
        assert isinstance(caught.value.__cause__, RuntimeError)
        np.testing.assert_array_equal(await neighbour, [[88, 88]])
        np.testing.assert_array_equal(await suite.score([sample("fine")]), [[4, 4]])
        health = suite.health()["length"]
        assert health["state"] == "ok"
        assert "device on fire" in health["last_error"]


async def test_health_is_failing_until_the_next_success():
    async with suite_of(HeldScorer()) as suite:
        with pytest.raises(ScoringError):
            await suite.score([sample("raise")])
        assert suite.health()["length"]["state"] == "failing"
        await suite.score([sample("fine")])
        assert suite.health()["length"]["state"] == "ok"


async def test_nan_is_an_error_of_its_own_request_only():
    scorer = HeldScorer(is_held=True)
    async with suite_of(scorer) as suite:
        first = asyncio.create_task(suite.score([sample("first")]))
        await entered(scorer)
        bad = asyncio.create_task(suite.score([sample("nan")]))
        good = asyncio.create_task(suite.score([sample("abc")]))
        await queued(suite, 2)
        scorer.gate.set()
        with pytest.raises(ScoringError, match="nan, which is no score"):
            await bad
        np.testing.assert_array_equal(await good, [[3]])
        await first
        assert scorer.batches == [[5], [3, 3]]
        with pytest.raises(ScoringError):  # it was not remembered as a score
            await suite.score([sample("nan")])


@pytest.mark.parametrize("text", ["encode", "template"])
async def test_text_that_cannot_be_prepared_fails_its_request(text):
    async with suite_of(HeldScorer()) as suite:
        results = await asyncio.gather(
            suite.score([sample(text)]), suite.score([sample("fine")]), return_exceptions=True
        )
        assert isinstance(results[0], ScoringError)
        np.testing.assert_array_equal(results[1], [[4]])


async def test_a_cancelled_request_takes_its_queued_inputs_along():
    scorer = HeldScorer(is_held=True)
    async with suite_of(scorer) as suite:
        first = asyncio.create_task(suite.score([sample("first")]))
        await entered(scorer)
        leaving = asyncio.create_task(suite.score([sample("shared"), sample("mine")]))
        staying = asyncio.create_task(suite.score([sample("shared")]))
        await queued(suite, 2)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await queued(suite, 1)
        scorer.gate.set()
        np.testing.assert_array_equal(await staying, [[6]])
        await first
        assert scorer.batches == [[5], [6]]
        np.testing.assert_array_equal(await suite.score([sample("mine")]), [[4]])


async def test_a_request_cancelled_while_its_batch_runs_leaves_the_score_behind():
    scorer = HeldScorer(is_held=True)
    async with suite_of(scorer) as suite:
        task = asyncio.create_task(suite.score([sample("abc")]))
        await entered(scorer)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        again = asyncio.create_task(suite.score([sample("abc")]))
        scorer.gate.set()
        np.testing.assert_array_equal(await again, [[3]])


async def test_closing_fails_what_is_in_flight():
    scorer = HeldScorer(is_held=True)
    suite = suite_of(scorer)
    await suite.start()
    task = asyncio.create_task(suite.score([sample("abc")]))
    await entered(scorer)
    closing = asyncio.create_task(suite.close())
    with pytest.raises(RewardError, match="closed while"):
        await task
    scorer.gate.set()
    await closing
    with pytest.raises(RewardError, match="closed"):
        await suite.score([sample("abc")])
    await suite.close()


async def test_the_loop_stays_free_while_the_device_works():
    """Nothing is waited for on the loop: it turns while the forward pass is held."""
    scorer = HeldScorer(is_held=True)
    async with suite_of(scorer) as suite:
        task = asyncio.create_task(suite.score([sample("abc")]))
        await entered(scorer)
        start = time.perf_counter()
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        assert time.perf_counter() - start < 10, "the loop waited for the device"
        scorer.gate.set()
        await task


async def test_a_subset_runs_only_its_scorers_in_the_suites_order():
    a, b, c = HeldScorer("a"), HeldScorer("b"), HeldScorer("c")
    async with suite_of(a, b, c) as suite:
        scores = await suite.score([sample("xyz")], ["c", "a"])
        assert scores.shape == (1, 2)
        assert (a.batches, b.batches, c.batches) == ([[3]], [], [[3]])
        assert (await suite.score([], None)).shape == (0, 3)
        assert (await suite.score([sample("x")], [])).shape == (1, 0)
        with pytest.raises(RewardError, match="did you mean 'a'"):
            await suite.score([sample("x")], ["aa"])


async def test_wrong_calls_say_what_to_do():
    suite = suite_of(HeldScorer())
    with pytest.raises(RewardError, match="start"):
        await suite.score([sample("x")])
    with pytest.raises(RewardError, match="start"):
        _ = suite.fingerprint
    async with suite:
        assert len(suite.fingerprint) == 64
        with pytest.raises(RewardError, match="started already"):
            await suite.start()


async def test_a_suite_that_cannot_load_ends_its_threads():
    def build():
        raise RewardError("no model")

    suite = suite_of(HeldScorer(), build=build)
    with pytest.raises(RewardError, match="no model"):
        await suite.start()
    with pytest.raises(RewardError, match="closed; load it again"):
        await suite.start()
    suite._runner.batcher.worker.join(20)
    assert not suite._runner.batcher.worker._thread.is_alive()


async def test_a_budget_below_the_longest_input_is_refused():
    suite = suite_of(HeldScorer(max_length=101), max_batch_tokens=100)
    with pytest.raises(RewardError, match="raise that, or lower this"):
        await suite.start()


def test_without_asyncio():
    with suite_of(HeldScorer()) as suite:
        np.testing.assert_array_equal(suite.score_sync([sample("abc")]), [[3]])
        np.testing.assert_array_equal(suite.score_sync([sample("abcd")]), [[4]])
