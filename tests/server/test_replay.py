"""Replay: the same palette chooses what was served, another one what its request would get."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from server import replay as replays_of
from server.calibration import Calibration
from solver import PilotSet
from tests.server.conftest import failed, fake_calibration, run_fake
from tests.server.fakes import EVERYTHING, FakeBackend
from tests.server.waiting import let_deadlines_wait

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 16}
LONG = {"targets": {"words": {"at_least": 13}, "variety": "keep"}}
FULL = {"report": "full"}
PALETTES = {
    "met": SHORT,
    "floors": {**SHORT, "floors": {"words": 4, "variety": 0.3}},
    "best": {**SHORT, "floors": {"words": 30}, "on_floor": "best", "on_infeasible": "repair"},
    "refused": {"targets": {"words": {"multiplier": -1}}, "floors": {"words": 20}, "candidates": 6},
    "auto": {"targets": {"words": {"at_most": 9}}, "candidates": "auto"},
    "answer": {"targets": {"words": {"quantile": 0.7}}, "scope": "answer"},
    "repair": {"targets": {"words": {"at_least": 19}}, "on_infeasible": "repair"},
    "max_kl": {"targets": {"words": {"at_least": 16}}, "max_kl": 0.1},
    "multiplier": {"targets": {"variety": {"multiplier": 3.0}}, "candidates": 5},
}


@pytest.fixture
async def running(tmp_path, settings):
    async with run_fake(tmp_path, settings, FakeBackend(features=EVERYTHING)) as found:
        yield found


def running_with(tmp_path, settings, backend=None, **changed):
    return run_fake(tmp_path, settings.model_copy(update=changed), backend)


async def answer(running, palette, **fields):
    reply = await running.chat(palette={**palette, **FULL}, **{"seed": 1, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def replayed(running, body, palette, **fields):
    return await running.client.post(
        "/v1/palette/replay", json={"id": body["id"], "palette": palette, **fields}
    )


async def report_of(running, body, palette, **fields):
    reply = await replayed(running, body, palette, **fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def same(report, served, texts=None):
    """Check that a replay chose what an answer's report with full detail says was served."""
    # In both, all that does not depend on time; the solver's digits are equal, not only close.
    shared = set(report) & set(served) - {"candidates_detail"}
    assert shared >= {"status", "scope", "targets", "multipliers", "expected", "realised", "ess",
                      "kl", "candidates", "calibration", "repair", "limited_by"}  # fmt: skip
    for name in shared:
        assert report[name] == served[name], name
    details = zip(report["candidates_detail"], served["candidates_detail"], strict=True)
    for mine, theirs in details:
        for name in ("index", "rewards", "weight", "chosen"):
            assert mine[name] == theirs[name], name
    chosen = {one["index"]: one["text"] for one in served["candidates_detail"]}
    if texts is not None:  # in order
        assert [chosen[index] for index in report["chosen"]] == texts


def texts_of(body):
    choices = body["choices"]
    if choices[0]["finish_reason"] == "content_filter":
        return []
    return [one["message"]["content"] if "message" in one else one["text"] for one in choices]


# the palette of the answer


@pytest.mark.parametrize("kind", PALETTES)
async def test_the_same_palette_chooses_what_was_served(running, kind):
    for seed in range(8):
        for n in (1, 3):
            body = await answer(running, PALETTES[kind], seed=seed, n=n)
            report = await report_of(running, body, PALETTES[kind])
            same(report, body["palette"], texts_of(body))
            assert report["chosen"] == report["served"]
            assert (report["id"], report["model"]) == (body["id"], "fake")


async def test_also_when_the_solver_has_forgotten(running):
    body = await answer(running, SHORT)
    running.context.aligner.promiser.cache.clear()
    same(await report_of(running, body, SHORT), body["palette"], texts_of(body))


async def test_each_prompt_of_a_completion(running):
    prompts = ["a", "a b", "a b c"]
    body = {"model": "fake", "prompt": prompts, "n": 2, "seed": 5, "max_tokens": 30,
            "palette": {**SHORT, **FULL}}  # fmt: skip
    served = (await running.client.post("/v1/completions", json=body)).json()
    texts = texts_of(served)
    for index in range(3):
        report = await report_of(running, served, SHORT, index=index)
        same(report, served["palette"][index], texts[2 * index : 2 * index + 2])
        assert report["index"] == index
        assert not report["calibration"]["valid"]  # no chat template, and another length
    assert await report_of(running, served, SHORT) == {
        **await report_of(running, served, SHORT, index=0)
    }
    message = failed(await replayed(running, served, SHORT, index=3), 404, "answer_not_found", "id")
    assert "prompt 3" in message


async def test_a_stream_is_kept_too(running):
    reply = await running.chat(palette=SHORT, seed=1, stream=True)
    identity = reply.text.split('"id":"')[1].split('"')[0]
    whole = await answer(running, SHORT)
    same(await report_of(running, {"id": identity}, SHORT), whole["palette"], texts_of(whole))


async def test_a_choice_within_a_deadline(tmp_path, settings, monkeypatch):
    backend = FakeBackend()
    backend.permits = asyncio.Semaphore(5)
    let_deadlines_wait(monkeypatch, backend)
    async with run_fake(tmp_path, settings, backend) as running:
        body = await answer(running, {**SHORT, "deadline_ms": 400})
        assert body["palette"]["candidates"] == 5
        report = await report_of(running, body, SHORT)
        same(report, body["palette"], texts_of(body))
        assert report["status"] == "best_effort"
        assert "5 of 16" in report["calibration"]["warnings"][0]
        # Another one is solved for as many, too, and says so.
        report = await report_of(running, body, LONG)
        assert (report["status"], report["candidates"]) == ("best_effort", 5)
        assert "5 of 16" in report["calibration"]["warnings"][0]
        reply = await running.client.post(
            "/v1/palette/solve", json={"palette": {**LONG, "candidates": 5}}
        )
        assert report["multipliers"] == reply.json()["multipliers"]
        message = failed(await replayed(running, body, {**LONG, "candidates": 5}), 400,
                         "invalid_palette", "palette.candidates")  # fmt: skip
        assert "16 candidates" in message


async def test_at_temperature_0(running):
    body = await answer(running, SHORT, temperature=0, n=2)
    report = await report_of(running, body, SHORT)
    same(report, body["palette"], texts_of(body))
    other = await answer(running, LONG, temperature=0, n=2)
    same(await report_of(running, body, LONG), other["palette"], texts_of(other))


# another palette


@pytest.mark.parametrize("kind", [kind for kind in PALETTES if kind != "auto"])
async def test_another_palette_chooses_what_its_request_gets(running, kind):
    palette = PALETTES[kind]
    n_candidates = palette.get("candidates", 16)
    n_changed = 0
    for seed in range(8):
        body = await answer(running, {"targets": {}, "candidates": n_candidates}, seed=seed, n=2)
        other = await answer(running, palette, seed=seed, n=2)
        report = await report_of(running, body, palette)
        same(report, other["palette"], texts_of(other))
        n_changed += report["served"] != report["chosen"]
    assert n_changed > 0


async def test_it_generates_and_scores_nothing(running, monkeypatch):
    body = await answer(running, SHORT)
    monkeypatch.setattr(running.context.aligner.rewards, "score", None)
    n_started = running.backend.n_started
    await report_of(running, body, LONG)
    assert running.backend.n_started == n_started


async def test_weights_and_rewards_of_every_candidate(running):
    body = await answer(running, SHORT)
    report = await report_of(running, body, LONG)
    detail = report["candidates_detail"]
    assert [one["index"] for one in detail] == list(range(16))
    assert sum(one["weight"] for one in detail) == pytest.approx(1)
    assert [one["index"] for one in detail if one["chosen"]] == report["chosen"]
    assert [one["index"] for one in detail if one["served"]] == report["served"]
    (chosen,) = report["chosen"]
    assert report["realised"] == detail[chosen]["rewards"]
    assert report["solve_ms"] >= 0


@pytest.mark.parametrize("candidates", [8, 17, "auto"])
async def test_another_number_of_candidates_is_refused(running, candidates):
    body = await answer(running, SHORT)
    reply = await replayed(running, body, {**LONG, "candidates": candidates})
    message = failed(reply, 400, "invalid_palette", "palette.candidates")
    assert "16 candidates" in message
    assert "leave candidates out" in message


async def test_what_cannot_be_had_is_told_as_to_a_request(running):
    body = await answer(running, SHORT)
    for palette, field in (
        ({"targets": {"words": {"at_least": 30}}}, "targets"),
        ({"targets": {"words": {"at_least": 30}}, "scope": "answer"}, "targets"),
        ({"targets": {}, "floors": {"words": 21}}, "floors"),
    ):
        asked = await running.chat(palette=palette, seed=1)
        reply = await replayed(running, body, palette)
        failed(reply, 422, "palette_infeasible", f"palette.{field}")
        assert reply.json() == asked.json()


@pytest.mark.parametrize(
    ("palette", "code", "param"),
    [
        ({"targets": {"wrods": "keep"}}, "unknown_value", "palette.targets.wrods"),
        ({"targets": {"words": 3}}, "invalid_palette", "palette.targets.words"),
        ({"target": {}}, "unknown_parameter", "palette.target"),
        (None, "invalid_value", "palette"),
        (
            {"targets": {"words": {"quantile": 0.5, "of": "traffic"}}, "scope": "answer"},
            "invalid_palette",
            "palette.targets.words.of",
        ),
    ],
)
async def test_bad_palettes(running, palette, code, param):
    body = await answer(running, SHORT)
    failed(await replayed(running, body, palette), 400, code, param)


async def test_it_is_solved_on_the_calibration_of_the_answer(running):
    body = await answer(running, SHORT)
    before = await report_of(running, body, LONG)
    running.context.aligner.calibration = other_calibration(1)
    running.context.aligner.promiser.cache.clear()
    assert (await answer(running, LONG))["palette"]["multipliers"] != before["multipliers"]
    after = await report_of(running, body, LONG)
    assert after["calibration"]["id"] == fake_calibration().id
    assert after["multipliers"] == pytest.approx(before["multipliers"])
    assert after["chosen"] == before["chosen"]


async def test_without_a_calibration(tmp_path, settings):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        body = await answer(running, PALETTES["multiplier"])
        report = await report_of(running, body, PALETTES["multiplier"])
        same(report, body["palette"], texts_of(body))
        assert not report["calibration"]["valid"]
        # Also where one came later: the answer was made without.
        running.context.aligner.calibration = fake_calibration()
        failed(await replayed(running, body, LONG), 422, "calibration_missing", "palette.targets")
        report = await report_of(running, body, {"targets": {"words": "keep"}, "scope": "answer"})
        assert report["calibration"]["id"] is None
        assert report["calibration"]["valid"]


async def test_profiles_and_the_floors_of_the_operator(tmp_path, settings):
    async with running_with(tmp_path, settings, floors={"words": 5.0}) as running:
        profile = {"palette": LONG}
        await running.client.put("/v1/palette/profiles/long", json=profile)
        body = await answer(running, SHORT)
        report = await report_of(running, body, {"profile": "long", "floors": {"words": 2}})
        assert report["profile"] == {"name": "long", "version": 1}
        for one in report["candidates_detail"]:
            assert (one["weight"] > 0) == (one["rewards"]["words"] >= 5)


# what is kept


async def test_texts_are_kept_when_the_operator_says_so(tmp_path, settings):
    for keeps in (False, True):
        async with running_with(tmp_path, settings, replay_texts=keeps) as running:
            body = await answer(running, SHORT)
            detail = (await report_of(running, body, LONG))["candidates_detail"]
            told = [one["text"] for one in body["palette"]["candidates_detail"]]
            assert [one["text"] for one in detail] == (told if keeps else [None] * 16)
            if not keeps:
                assert not any(text in repr(running.context.replays._entries) for text in told)


async def test_the_oldest_is_forgotten_first(tmp_path, settings):
    async with running_with(tmp_path, settings, replay_entries=3) as running:
        bodies = [await answer(running, SHORT, seed=seed) for seed in range(5)]
        assert len(running.context.replays) == 3
        for body in bodies[:2]:
            message = failed(await replayed(running, body, SHORT), 404, "answer_not_found", "id")
            assert "last 3 answers" in message
            assert "send the request again" in message
        for body in bodies[2:]:
            same(await report_of(running, body, SHORT), body["palette"])


async def test_none_are_kept_where_the_operator_says_so(tmp_path, settings):
    async with running_with(tmp_path, settings, replay_entries=0) as running:
        body = await answer(running, SHORT)
        message = failed(await replayed(running, body, SHORT), 404, "answer_not_found", "id")
        assert "replay_entries" in message
        assert len(running.context.replays) == 0


@pytest.mark.parametrize("identity", ["", "chatcmpl-1", "\x00", "x" * 256])
async def test_unknown_answers(running, identity):
    failed(await replayed(running, {"id": identity}, SHORT), 404, "answer_not_found", "id")


async def test_an_answer_without_a_palette_was_not_scored(running):
    body = (await running.chat(palette=None)).json()
    failed(await replayed(running, body, SHORT), 404, "answer_not_found", "id")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"id": 1}, "id"), ({"index": -1}, "index"), ({"index": "x"}, "index"), ({"n": 1}, "n")],
)
async def test_bad_bodies(running, fields, param):
    body = {"id": "a", "palette": SHORT, **fields}
    reply = await running.client.post("/v1/palette/replay", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def other_calibration(seed):
    known = fake_calibration()
    rewards = known.pilot.rewards + seed
    return Calibration(PilotSet(rewards, known.pilot.values), known.info)


async def test_old_calibrations_are_let_go_with_their_answers(running):
    aligner, kept = running.context.aligner, running.context.replays
    palette = {"targets": {"words": {"multiplier": -0.1}}, "candidates": 2}
    bodies = []
    for seed in range(replays_of.CALIBRATIONS + 2):
        aligner.calibration = other_calibration(seed)
        for _ in range(3):
            bodies.append(await answer(running, palette))
    assert len(kept) == 3 * replays_of.CALIBRATIONS
    entries = kept._entries.values()
    assert kept._calibrations == Counter(id(entry.group.calibration) for entry in entries)
    failed(await replayed(running, bodies[5], palette), 404, "answer_not_found", "id")
    assert (await replayed(running, bodies[6], palette)).status_code == 200


async def test_every_observer_is_told(running):
    told = []
    running.context.aligner.observers.append(told.append)
    body = await answer(running, SHORT)
    (served,) = told
    assert served.plan.request.answer_id == body["id"]
    assert len(running.context.replays) == 1
    assert b"palette_candidates_total" in (await running.client.get("/metrics")).content
