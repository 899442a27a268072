"""A deadline: the choice is made among what is there, and says so."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from server.backends.base import BackendError, Candidate
from server.drawing import Draw
from tests.server.conftest import run_fake
from tests.server.fakes import FakeBackend
from tests.server.waiting import let_deadlines_wait, until

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 16, "report": "full"}
LATE_MS = 600_000  # nobody waits that long
SOON_MS = 400


@pytest.fixture
async def timed(tmp_path, settings):
    """Candidates come as far as there are permits, and no further."""
    backend = FakeBackend()
    backend.permits = asyncio.Semaphore(5)
    async with run_fake(tmp_path, settings, backend) as found:
        yield found


@pytest.fixture
def stuck(timed, monkeypatch):
    """As `timed`, with deadlines that come when there are as many as come."""
    let_deadlines_wait(monkeypatch, timed.backend)
    return timed


async def served(running, palette, **fields):
    reply = await running.chat(palette=palette, seed=1, **fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def solved(running, n_candidates, **palette):
    asked = {name: value for name, value in SHORT.items() if name != "report"}
    body = {"palette": {**asked, **palette, "candidates": n_candidates}}
    return (await running.client.post("/v1/palette/solve", json=body)).json()


async def test_the_choice_is_among_those_that_are_there(stuck):
    body = await served(stuck, SHORT | {"deadline_ms": SOON_MS})
    report = body["palette"]
    assert report["deadline"] == {"ms": SOON_MS, "asked": 16, "used": 5, "met": True}
    assert report["candidates"] == 5
    detail = report["candidates_detail"]
    assert [one["index"] for one in detail] == [11, 12, 13, 14, 15]
    assert sum(one["weight"] for one in detail) == pytest.approx(1)
    assert [one["text"] for one in detail if one["chosen"]] == [
        body["choices"][0]["message"]["content"]
    ]
    spent = sum(len(one["text"].split()) + 1 for one in detail)
    assert body["usage"]["completion_tokens"] == spent
    assert stuck.backend.n_cancelled == 1
    assert stuck.context.aligner.admission.n_running == 0


async def test_multipliers_are_those_of_as_many_as_there_are(stuck):
    report = (await served(stuck, SHORT | {"deadline_ms": SOON_MS}))["palette"]
    fewer, more = await solved(stuck, 5), await solved(stuck, 16)
    assert report["multipliers"] == fewer["multipliers"] != more["multipliers"]
    # Those that finish first are the short ones: what was promised on average is not sure to hold.
    assert report["status"] == "best_effort"
    assert not report["calibration"]["valid"]
    assert "5 of 16" in report["calibration"]["warnings"][0]


async def test_a_deadline_that_is_kept_changes_nothing(running):
    free = (await served(running, SHORT))["palette"]
    kept = (await served(running, SHORT | {"deadline_ms": LATE_MS}))["palette"]
    assert kept["deadline"] == {"ms": LATE_MS, "asked": 16, "used": 16, "met": True}
    assert free["deadline"] is None
    for name in ("status", "multipliers", "realised", "candidates_detail", "calibration"):
        assert kept[name] == free[name]


async def test_the_first_is_waited_for_when_there_is_none(timed):
    timed.backend.permits = asyncio.Semaphore(0)
    waiting = asyncio.create_task(served(timed, SHORT | {"deadline_ms": 1}))
    await until(lambda: timed.backend.n_started == 1)
    await asyncio.sleep(0.05)  # well past the deadline
    assert not waiting.done()
    timed.backend.permits.release()
    report = (await waiting)["palette"]
    assert report["deadline"] == {"ms": 1, "asked": 16, "used": 1, "met": False}
    assert timed.backend.n_cancelled == 1


async def test_as_many_as_there_are_choices_are_waited_for(timed):
    timed.backend.permits = asyncio.Semaphore(2)
    waiting = asyncio.create_task(served(timed, SHORT | {"deadline_ms": 1}, n=3))
    await until(lambda: timed.backend.n_started == 1)
    await asyncio.sleep(0.05)
    assert not waiting.done()
    timed.backend.permits.release()
    body = await waiting
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 3
    assert body["palette"]["deadline"]["used"] == 3


async def test_scope_answer_is_solved_on_those(stuck):
    palette = SHORT | {"scope": "answer", "deadline_ms": SOON_MS}
    report = (await served(stuck, palette))["palette"]
    detail = report["candidates_detail"]
    assert len(detail) == 5
    words = sum(one["weight"] * one["rewards"]["words"] for one in detail)
    assert words <= 8 + 1e-6
    # It holds on these very candidates, which is all that was asked.
    assert report["status"] == "met"
    assert report["calibration"]["warnings"] == []


@pytest.mark.parametrize(
    ("on_infeasible", "status"),
    [("reject", "best_effort"), ("best_effort", "best_effort"), ("repair", "repaired")],
)
async def test_what_fewer_cannot_give_is_not_refused_then(stuck, on_infeasible, status):
    palette = SHORT | {
        "targets": {"words": {"at_least": 17}}, "candidates": 32, "on_infeasible": on_infeasible,
    }  # fmt: skip
    assert (await solved(stuck, 32, targets=palette["targets"]))["status"] == "optimal"
    stuck.backend.permits = asyncio.Semaphore(2)
    report = (await served(stuck, palette | {"deadline_ms": SOON_MS}))["palette"]
    assert report["status"] == status
    assert report["deadline"]["used"] == 2
    assert report["targets"]["words"] < 17
    assert report["repair"] is not None


async def test_multipliers_that_were_given_stay(stuck):
    palette = {"targets": {"words": {"multiplier": -1.0}}, "deadline_ms": SOON_MS}
    report = (await served(stuck, palette))["palette"]
    assert report["multipliers"]["words"] == -1.0
    assert report["deadline"]["used"] == 5


async def test_a_stream_keeps_its_deadline(stuck):
    reply = await stuck.chat(palette=SHORT | {"deadline_ms": SOON_MS}, stream=True)
    assert '"used":5' in reply.text
    assert reply.text.endswith("data: [DONE]\n\n")


async def test_a_failure_before_the_deadline_is_told(running):
    running.backend.failure = BackendError("the model broke")
    reply = await running.chat(palette=SHORT | {"deadline_ms": LATE_MS})
    assert reply.status_code == 500


@pytest.mark.parametrize("deadline", [0, -1, "soon"])
async def test_no_deadline(running, deadline):
    reply = await running.chat(palette=SHORT | {"deadline_ms": deadline})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "palette.deadline_ms"


# The draw alone


def candidate(index):
    return Candidate(index, "a", (), 1, "stop")


async def test_what_is_finished_and_not_scored_does_not_count():
    scoring = {index: asyncio.Event() for index in range(3)}

    async def stream():
        for index in (2, 0, 1):
            yield candidate(index)
        await asyncio.Event().wait()

    async def score(one):
        await scoring[one.index].wait()
        return np.array([[float(one.index)]])

    draw = Draw(stream(), score, n_needed=2)
    work = asyncio.create_task(draw.run_until(time.perf_counter() - 1.0))
    scoring[2].set()
    await until(lambda: len(draw.ready()[0]) == 1)
    assert not work.done()
    scoring[0].set()
    assert await work is False
    candidates, rewards = draw.ready()
    assert [one.index for one in candidates] == [0, 2]
    np.testing.assert_array_equal(rewards, [[0.0], [2.0]])
    assert [one.index for one in draw.finished] == [2, 0, 1]


async def test_a_scorer_that_fails_takes_the_generation_with_it():
    closed = asyncio.Event()

    async def stream():
        try:
            yield candidate(0)
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def score(one):
        raise ValueError("broken")

    for work in (Draw(stream(), score, 1).run(), Draw(stream(), score, 1).run_until(1e18)):
        with pytest.raises(ValueError, match="broken"):
            await work
        assert closed.is_set()
        closed.clear()
