import threading
import time

import numpy as np
import pytest

from solver import Palette, PilotError, SolutionCache, SolverError, Status, cache
from tests.solver.problems import gaussian_pilot


@pytest.fixture
def pilot():
    return gaussian_pilot(0)


def gains(*gains):
    return Palette({f"v{i}": {"gain": gain} for i, gain in enumerate(gains)})


def test_cold_then_cached_then_warm(pilot):
    store = SolutionCache()
    assert store.lookup(gains(0.3), pilot, 8) is None
    first, origin = store.solve(gains(0.3), pilot, 8)
    assert origin == "cold"
    again, origin = store.solve(gains(0.3), pilot, 8)
    assert origin == "cached"
    assert again is first
    assert store.lookup(gains(0.3), pilot, 8, seed=0) is first
    near, origin = store.solve(gains(0.31), pilot, 8)
    assert origin == "warm"
    assert near.status is Status.OPTIMAL
    assert len(store) == 2


def test_every_part_of_the_key_counts(pilot):
    store = SolutionCache()
    first, _ = store.solve(gains(0.3), pilot, 8)
    others = [
        (gains(0.4), pilot, 8, {}),
        (Palette(gains(0.3).targets, {"v0": -9.0}), pilot, 8, {}),
        (gains(0.3), gaussian_pilot(1), 8, {}),
        (gains(0.3), pilot, 4, {}),
        (gains(0.3), pilot, 8, {"seed": 1}),
        (gains(0.3), pilot, 8, {"groups": 40}),
        (gains(0.3), pilot, 8, {"ridge": 0.1}),
        (gains(0.3), pilot, 8, {"max_kl": 0.01}),
        (gains(0.3), pilot, 8, {"max_iterations": 50}),
    ]
    for palette, where, n, options in others:
        assert store.lookup(palette, where, n, **options) is None
        solution, origin = store.solve(palette, where, n, **options)
        assert origin != "cached"
        assert solution is not first
    assert len(store) == 10
    with pytest.raises(TypeError, match="warm_start"):
        store.lookup(gains(0.3), pilot, 8, warm_start=[1, 2, 3])


def test_the_nearest_neighbour_of_the_same_family_starts_it(pilot, monkeypatch):
    seen = []

    def spy(*args, warm_start, **kwargs):
        seen.append(warm_start)
        return solve(*args, warm_start=warm_start, **kwargs)

    solve = cache.solve
    monkeypatch.setattr(cache, "solve", spy)
    store = SolutionCache()
    far, _ = store.solve(gains(0.1, 0.1), pilot, 8)
    close, _ = store.solve(gains(0.4, 0.4), pilot, 8)
    store.solve(gains(0.2, 0.6), pilot, 4)
    store.solve(gains(0.4), pilot, 8)
    store.solve(gains(9.0, 9.0), pilot, 8)  # infeasible: starts from a neighbour, becomes none
    store.solve(gains(0.38, 0.44), pilot, 8)
    assert seen == [None, far, None, None, close, close]


def test_infeasible_palettes_are_kept_too(pilot):
    store = SolutionCache()
    solution, _ = store.solve(gains(9.0), pilot, 8)
    assert solution.status is Status.INFEASIBLE
    assert store.solve(gains(9.0), pilot, 8) == (solution, "cached")


def test_the_oldest_unused_entry_goes(pilot):
    store = SolutionCache(max_entries=2)
    store.solve(gains(0.1), pilot, 8)
    store.solve(gains(0.2), pilot, 8)
    assert store.lookup(gains(0.1), pilot, 8) is not None
    store.solve(gains(0.3), pilot, 8)
    assert store.lookup(gains(0.2), pilot, 8) is None
    assert store.lookup(gains(0.1), pilot, 8) is not None
    store.clear()
    assert len(store) == 0
    with pytest.raises(SolverError, match="max_entries"):
        SolutionCache(0)


class Held:
    """A solve that waits to be let go, and counts its calls."""

    def __init__(self, result):
        self.result = result
        self.calls = 0
        self.started = threading.Event()
        self.released = threading.Event()

    def __call__(self, *args, **kwargs):
        self.calls += 1
        self.started.set()
        assert self.released.wait(10)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def race(store, palette, pilot, held, n_threads=8):
    outcomes = []

    def ask():
        try:
            outcomes.append(store.solve(palette, pilot, 8))
        except SolverError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=ask) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    assert held.started.wait(10)
    time.sleep(0.05)  # let the others reach the wait; a late one reads the cache, to the same end
    held.released.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    return outcomes


def test_threads_that_ask_at_once_share_one_solve(pilot, monkeypatch):
    solution = cache.solve(gains(0.3), pilot, 8)
    held = Held(solution)
    monkeypatch.setattr(cache, "solve", held)
    outcomes = race(SolutionCache(), gains(0.3), pilot, held)
    assert held.calls == 1
    assert all(found is solution for found, _ in outcomes)
    assert sorted(origin for _, origin in outcomes) == ["cached"] * 7 + ["cold"]


def test_an_exception_reaches_all_waiters_and_is_not_kept(pilot, monkeypatch):
    held = Held(PilotError("no"))
    monkeypatch.setattr(cache, "solve", held)
    store = SolutionCache()
    outcomes = race(store, gains(0.3), pilot, held)
    assert len(outcomes) == 8
    assert all(isinstance(error, PilotError) for error in outcomes)
    monkeypatch.undo()
    assert store.solve(gains(0.3), pilot, 8)[1] == "cold"


def test_a_mistake_in_the_palette_frees_the_key(pilot):
    store = SolutionCache()
    for _ in range(2):
        with pytest.raises(SolverError, match="unknown value"):
            store.solve(Palette({"w": "keep"}), pilot, 8)


def test_many_threads_and_palettes(pilot):
    store = SolutionCache(max_entries=8)
    wrong = []

    def ask(seed):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            gain = round(float(rng.uniform(0, 0.5)), 1)
            solution, _ = store.solve(gains(gain), pilot, 8)
            wanted = pilot.base[0] + gain * pilot.within_std[0]
            if abs(solution.expected[0] - wanted) > 1e-6:
                wrong.append(gain)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert len(store) <= 8
