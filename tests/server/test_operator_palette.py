"""What the operator sets for all requests: the default palette and the floors."""

from __future__ import annotations

import pytest

from server.profile_file import ProfileError
from server.profiles import FILE, ProfileNotFoundError, Profiles
from solver import PaletteError, UnknownValueError
from tests.server.conftest import failed, run_fake
from tests.server.fakes import EVERYTHING, FakeBackend
from tests.server.profile_calls import SHORT, URL, put, report_of


@pytest.fixture
def floored(tmp_path, settings):
    def run(**floors):
        changed = settings.model_copy(update={"floors": floors or {"words": 10.0}})
        return run_fake(tmp_path, changed, FakeBackend(features=EVERYTHING))

    return run


# the operator's default


@pytest.fixture
def stored(settings):
    profiles = Profiles(settings.state_dir / FILE)
    yield profiles
    profiles.close()


async def test_what_the_default_asks_for_is_told_as_its_own(tmp_path, settings):
    changed = {"default_palette": {"targets": {"wrods": "keep"}}}
    with pytest.raises(UnknownValueError) as failure:
        async with run_fake(tmp_path, settings.model_copy(update=changed)):
            pass
    assert "PALETTE_DEFAULT_PALETTE" in failure.value.__notes__[0]


async def test_the_default_may_be_a_profile(tmp_path, settings, stored):
    stored.put("house", SHORT)
    settings = settings.model_copy(update={"default_palette": {"profile": "house"}})
    async with run_fake(tmp_path, settings) as running:
        report = await report_of(running)
        assert report["profile"] == {"name": "house", "version": 1}
        assert report["targets"] == {"words": 8}
        await put(running, "house", {"targets": {"words": {"at_most": 9}}})
        assert (await report_of(running))["targets"] == {"words": 9}
        assert (await running.chat(palette=None)).json().get("palette") is None
        assert (await report_of(running, palette={}))["profile"] is None
        await put(running, "brief", {"targets": {}})
        assert (await report_of(running, model="fake:brief"))["profile"]["name"] == "brief"
        reply = await running.client.delete(f"{URL}/house")
        assert "default" in failed(reply, 409, "profile_in_use")
        assert (await running.chat()).status_code == 200


@pytest.mark.parametrize(
    ("palette", "error"),
    [
        ({"profile": "nope"}, ProfileNotFoundError),
        ({"profile": "old"}, UnknownValueError),
        ({"profile": "house", "targets": {"wrods": "keep"}}, UnknownValueError),
        ({"profile": "broken"}, ProfileError),
    ],
)
async def test_a_default_that_cannot_be_used_stops_the_start(
    tmp_path, settings, stored, palette, error
):
    stored.put("house", SHORT)
    stored.put("old", {"targets": {"politeness": "keep"}})
    stored.put("broken", {"goals": {}})
    settings = settings.model_copy(update={"default_palette": palette})
    with pytest.raises(error):
        async with run_fake(tmp_path, settings):
            pass


async def test_a_default_may_ask_for_a_quantile_of_traffic(tmp_path, settings):
    palette = {"targets": {"words": {"quantile": 0.6, "of": "traffic"}}}
    settings = settings.model_copy(update={"default_palette": palette})
    async with run_fake(tmp_path, settings) as running:
        assert (await report_of(running))["status"] == "met"


# the operator's floors


async def test_floors_of_unknown_values_stop_the_start(floored):
    with pytest.raises(UnknownValueError, match=r"the operator's floors\.wrods"):
        async with floored(wrods=1.0):
            pass


async def test_a_default_below_the_floors_stops_the_start(tmp_path, settings):
    changed = {"floors": {"words": 1.0}, "default_palette": {"on_floor": "best"}}
    with pytest.raises(PaletteError, match="floors"):
        async with run_fake(tmp_path, settings.model_copy(update=changed)):
            pass


# No answer of 1000 is below the floor under any of them; without it, about half are.
PALETTES = {
    "null": None,
    "absent": ...,
    "empty": {},
    "lower": {"floors": {"words": 1}},
    "pulled": {"targets": {"words": {"multiplier": -5}}},
    "another": {"targets": {"words": "keep"}, "floors": {"variety": 0.1}},
    "repaired": {"targets": {"words": {"at_most": 3}}, "on_infeasible": "repair"},
    "best effort": {"targets": {"words": {"at_most": 3}}, "on_infeasible": "best_effort"},
    "answer": {"targets": {"words": {"quantile": 0.3}}, "scope": "answer",
               "on_infeasible": "best_effort"},
    "silent": {"report": "none"},
    "deadline": {"deadline_ms": 60_000},
    "profile": {"profile": "low"},
}  # fmt: skip


@pytest.mark.parametrize("kind", PALETTES)
async def test_no_request_gets_below_the_floors(floored, kind):
    fields = {} if PALETTES[kind] is ... else {"palette": PALETTES[kind]}
    async with floored(words=10.0) as running:
        await put(running, "low", {"floors": {"words": 0}, "targets": {"words": {"at_most": 12}}})
        for seed in range(20):
            reply = await running.chat(seed=seed, n=2, **fields)
            assert reply.status_code == 200, reply.text
            for choice in reply.json()["choices"]:
                if choice["finish_reason"] == "content_filter":
                    continue
                assert len(choice["message"]["content"].split()) >= 10
            body = {"model": "fake", "prompt": ["a", "b"], "max_tokens": 30, "seed": seed, **fields}
            reply = await running.client.post("/v1/completions", json=body)
            for choice in reply.json()["choices"]:
                assert len(choice["text"].split()) >= 10


async def test_without_floors_they_would(able):
    lengths = [
        len((await able.chat(seed=seed)).json()["choices"][0]["message"]["content"].split())
        for seed in range(20)
    ]
    assert min(lengths) < 10


async def test_the_higher_of_two_floors_holds(floored):
    async with floored(words=5.0) as running:
        palette = {"floors": {"words": 12}, "report": "full"}
        detail = (await report_of(running, palette=palette))["candidates_detail"]
        lengths = [one["rewards"]["words"] for one in detail]
        assert min(lengths) < 5
        assert max(lengths) >= 12
        for one in detail:
            assert (one["weight"] > 0) == (one["rewards"]["words"] >= 12)


async def test_a_request_without_a_palette_is_chosen_evenly_above_the_floors(floored):
    async with floored(words=10.0) as running:
        report = await report_of(running, palette=None)
        assert report["candidates"] == running.context.settings.candidates
        assert set(report["multipliers"].values()) == {0.0}
        n_above = round(report["ess"])
        assert report["ess"] == pytest.approx(n_above)
        assert 1 <= n_above < report["candidates"]


async def test_where_none_clears_them_nothing_is_served(floored):
    async with floored(words=20.0) as running:
        found = [(await running.chat(seed=seed, palette=None)).json() for seed in range(10)]
    reasons = {body["choices"][0]["finish_reason"] for body in found}
    assert reasons == {"stop", "content_filter"}  # 16 candidates of 20 lengths: 56 % have one
    for body in found:
        choice = body["choices"][0]
        if choice["finish_reason"] == "content_filter":
            assert choice["message"]["content"] is None


async def test_best_would_be_below_them_and_is_refused(floored):
    async with floored(words=10.0) as running:
        for palette in ({"on_floor": "best"}, {"on_floor": "best", "floors": {"words": 12}}):
            for reply in (
                await running.chat(palette=palette),
                await put(running, "low", palette),
                await running.client.post("/v1/palette/solve", json={"palette": palette}),
            ):
                message = failed(reply, 400, "invalid_palette", "palette.on_floor")
                assert "leave on_floor out" in message
        running.context.aligner.layers.profiles.put("low", {"on_floor": "best"})
        reply = await running.chat(palette={"profile": "low"})
        failed(reply, 400, "invalid_palette", "palette.on_floor")


async def test_solve_knows_the_floors(floored):
    palette = {"targets": {"words": {"at_least": 14}}}
    async with floored(words=10.0) as running:
        promised = (await report_of(running, palette=palette))["multipliers"]
        reply = await running.client.post("/v1/palette/solve", json={"palette": palette})
        assert reply.json()["multipliers"] == pytest.approx(promised)


async def test_floors_hold_before_there_is_a_calibration(tmp_path, settings):
    settings = settings.model_copy(update={"floors": {"words": 10.0}})
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        for palette in (None, {"targets": {"words": {"multiplier": -2}}}):
            for seed in range(10):
                reply = await running.chat(seed=seed, palette=palette)
                content = reply.json()["choices"][0]["message"]["content"]
                assert len(content.split()) >= 10
