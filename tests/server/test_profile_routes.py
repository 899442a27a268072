"""Profiles over HTTP: written, read, chosen by field or model name, under the operator's floors."""

from __future__ import annotations

import pytest
from fastapi.openapi.models import OpenAPI

from server.layers import laid_over, split_model
from server.profile_file import ProfileError, ProfileFileError
from server.profiles import FILE, ProfileNotFoundError, Profiles
from server.schemas import PaletteOptions
from solver import PaletteError, UnknownValueError
from tests.server.conftest import run_fake
from tests.server.fakes import EVERYTHING, FakeBackend

URL = "/v1/palette/profiles"
SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 8}


async def put(running, name, palette, **fields):
    return await running.client.put(f"{URL}/{name}", json={"palette": palette, **fields})


async def get(running, path=""):
    return await running.client.get(f"{URL}{path}")


async def report_of(running, **body):
    reply = await running.chat(seed=1, **body)
    assert reply.status_code == 200, reply.text
    return reply.json()["palette"]


def failed(reply, status, code, param=None):
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    return error["message"]


@pytest.fixture
def floored(tmp_path, settings):
    def run(**floors):
        changed = settings.model_copy(update={"floors": floors or {"words": 10.0}})
        return run_fake(tmp_path, changed, FakeBackend(features=EVERYTHING))

    return run


@pytest.fixture
async def running(tmp_path, settings):
    async with run_fake(tmp_path, settings, FakeBackend(features=EVERYTHING)) as found:
        yield found


# the store


async def test_write_read_and_list(running):
    written = (await put(running, "brief", SHORT, description="Few words.")).json()
    assert written == {
        "object": "palette.profile",
        "name": "brief",
        "version": 1,
        "palette": SHORT,
        "description": "Few words.",
        "created": written["created"],
        "deleted": False,
    }
    assert (await get(running, "/brief")).json() == written
    assert (await get(running)).json() == {"object": "list", "data": [written]}
    second = (await put(running, "brief", {"targets": {}})).json()
    assert second["version"] == 2
    assert (await get(running, "/brief")).json() == second
    assert (await get(running, "/brief?version=1")).json() == written
    assert (await get(running, "/brief/versions")).json()["data"] == [second, written]
    assert (await get(running)).json()["data"] == [second]


async def test_delete_keeps_history(running):
    written = (await put(running, "brief", SHORT)).json()
    reply = await running.client.delete(f"{URL}/brief")
    assert reply.status_code == 200
    deletion = reply.json()
    assert (deletion["version"], deletion["palette"], deletion["deleted"]) == (2, None, True)
    failed(await get(running, "/brief"), 404, "profile_not_found")
    failed(await running.client.delete(f"{URL}/brief"), 404, "profile_not_found")
    assert (await get(running)).json()["data"] == []
    assert (await get(running, "/brief?version=1")).json() == written
    assert (await get(running, "/brief/versions")).json()["data"] == [deletion, written]
    failed(await running.chat(palette={"profile": "brief"}), 404, "profile_not_found",
           "palette.profile")  # fmt: skip


async def test_an_update_made_for_another_version(running):
    assert (await put(running, "brief", SHORT, expected_version=0)).status_code == 200
    reply = await put(running, "brief", SHORT, expected_version=0)
    assert "at version 1" in failed(reply, 409, "version_conflict", "expected_version")
    assert (await put(running, "brief", SHORT, expected_version=1)).json()["version"] == 2
    reply = await running.client.delete(f"{URL}/brief?expected_version=1")
    failed(reply, 409, "version_conflict", "expected_version")
    reply = await running.client.delete(f"{URL}/brief?expected_version=2")
    assert reply.status_code == 200


async def test_it_is_there_after_a_restart(tmp_path, settings):
    async with run_fake(tmp_path, settings) as running:
        written = (await put(running, "brief", SHORT)).json()
    async with run_fake(tmp_path, settings) as running:
        assert (await get(running, "/brief")).json() == written
    assert (settings.state_dir / FILE).exists()


@pytest.mark.parametrize(
    ("palette", "status", "code", "param"),
    [
        ({"targets": {"wrods": "keep"}}, 400, "unknown_value", "palette.targets.wrods"),
        ({"floors": {"wrods": 1}}, 400, "unknown_value", "palette.floors.wrods"),
        ({"targets": {"words": 3}}, 400, "invalid_palette", "palette.targets.words"),
        ({"candidates": 1000}, 400, "invalid_palette", "palette.candidates"),
        ({"profile": "other"}, 400, "invalid_palette", "palette.profile"),
        ({"target": {}}, 400, "unknown_parameter", "palette.target"),
        (None, 400, "invalid_value", "palette"),
    ],
)
async def test_what_is_no_palette_is_not_stored(running, palette, status, code, param):
    asked = await running.chat(palette=palette)
    message = failed(await put(running, "brief", palette), status, code, param)
    if code == "unknown_value":
        assert message == failed(asked, status, code, param)
    failed(await get(running, "/brief"), 404, "profile_not_found")


@pytest.mark.parametrize("name", ["a b", "a:b", ".x", "x" * 65, "%C3%A4"])
async def test_names_that_are_none(running, name):
    failed(await put(running, name, SHORT), 400, "invalid_value", "name")
    failed(await get(running, f"/{name}"), 404, "profile_not_found")


@pytest.mark.parametrize("query", ["version=0", "version=x", f"version={2**63}"])
async def test_versions_that_are_none(running, query):
    await put(running, "brief", SHORT)
    failed(await get(running, f"/brief?{query}"), 400, "invalid_value", "version")
    failed(await get(running, "/brief?version=2"), 404, "profile_not_found")


@pytest.mark.parametrize("name", ["nope", "a/b", "", "\x00", "x" * 257])
async def test_a_profile_that_is_not_there(running, name):
    reply = await running.chat(palette={"profile": name})
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["param"] == "palette.profile"


async def test_a_damaged_file_stops_the_start(tmp_path, settings):
    settings.state_dir.mkdir()
    (settings.state_dir / FILE).write_text("no profiles at all\n" * 100)
    with pytest.raises(ProfileFileError, match="left as it is"):
        async with run_fake(tmp_path, settings):
            pass


async def test_a_file_damaged_later_is_an_error_of_the_server(tmp_path, settings, caplog):
    async with run_fake(tmp_path, settings) as running:
        settings.state_dir.mkdir()
        (settings.state_dir / FILE).write_text("no profiles at all\n" * 100)
        failed(await get(running), 500, "profiles_failed")
        failed(await running.chat(palette={"profile": "x"}), 500, "profiles_failed")
        assert (await running.chat(palette=SHORT)).status_code == 200
    assert "damaged" in caplog.text


async def test_openapi_describes_them(running):
    schema = (await running.client.get("/openapi.json")).json()
    OpenAPI.model_validate(schema)
    found = {path: set(schema["paths"][path]) for path in schema["paths"] if path.startswith(URL)}
    assert found == {
        URL: {"get"},
        f"{URL}/{{name}}": {"get", "put", "delete"},
        f"{URL}/{{name}}/versions": {"get"},
    }
    assert set(schema["paths"]["/v1/palette/replay"]) == {"post"}
    operations = [one["operationId"] for path in schema["paths"].values() for one in path.values()]
    assert len(set(operations)) == len(operations)
    assert "profile" in schema["components"]["schemas"]["PaletteOptions"]["properties"]


# the profile as ground


@pytest.mark.parametrize(
    ("ground", "given", "found"),
    [
        (SHORT, {}, SHORT),
        (
            {"targets": {"a": "keep", "b": {"gain": 1}}},
            {"targets": {"b": "keep", "c": "keep"}},
            {"targets": {"a": "keep", "b": "keep", "c": "keep"}},
        ),
        (
            {"floors": {"a": 1, "b": 5, "c": 0}},
            {"floors": {"a": 2, "b": 4, "d": -1}},
            {"floors": {"a": 2, "b": 5, "c": 0, "d": -1}},
        ),
        # Only what the request says counts, though it be the default.
        (
            {"candidates": 8, "max_kl": 1.0, "scope": "answer", "on_infeasible": "repair"},
            {"candidates": None, "scope": "traffic"},
            {"candidates": None, "max_kl": 1.0, "scope": "traffic", "on_infeasible": "repair"},
        ),
        (
            {"repair": {"method": "greedy", "priorities": ["a"]}},
            {"repair": {"method": "nearest"}},
            {"repair": {"method": "nearest"}},
        ),
    ],
    ids=["nothing", "targets", "floors", "fields", "repair"],
)
def test_what_is_given_lies_over_the_profile(ground, given, found):
    laid = laid_over(PaletteOptions(**ground), PaletteOptions(profile="x", **given))
    assert laid == PaletteOptions(**found)
    assert laid.profile is None


async def test_a_profile_is_what_its_palette_is(running):
    await put(running, "brief", {})
    await put(running, "brief", SHORT)
    report = await report_of(running, palette={"profile": "brief"})
    assert report.pop("profile") == {"name": "brief", "version": 2}
    alone = await report_of(running, palette=SHORT)
    assert alone.pop("profile") is None
    assert {**report, "timing_ms": None} == {**alone, "timing_ms": None}
    # What was written later is not what was served before.
    await put(running, "brief", {"targets": {"words": {"at_least": 13}}})
    assert (await report_of(running, palette={"profile": "brief"}))["targets"] == {"words": 13}


async def test_fields_of_the_request_lie_over_it(running):
    await put(running, "brief", {**SHORT, "floors": {"words": 2}, "report": "full"})
    over = {"targets": {"variety": "keep"}, "candidates": 6, "floors": {"words": 5}}
    report = await report_of(running, palette={"profile": "brief", **over})
    assert set(report["targets"]) == {"words", "variety"}
    detail = report["candidates_detail"]
    assert len(detail) == report["candidates"] == 6
    assert all(one["weight"] == 0 for one in detail if one["rewards"]["words"] < 5)


async def test_a_profile_on_all_routes(running):
    await put(running, "brief", SHORT)
    wanted = {"profile": "brief"}
    promised = (await report_of(running, palette=wanted))["multipliers"]
    reply = await running.client.post("/v1/palette/solve", json={"palette": wanted})
    assert reply.json()["multipliers"] == pytest.approx(promised)
    assert reply.json()["profile"] == {"name": "brief", "version": 1}
    body = {"model": "fake", "prompt": ["a", "b"], "palette": wanted, "seed": 1}
    reports = (await running.client.post("/v1/completions", json=body)).json()["palette"]
    assert [report["profile"]["name"] for report in reports] == ["brief", "brief"]
    body = {"values": ["variety", "log_likelihood"], "palette": wanted, "points": 3}
    points = (await running.client.post("/v1/palette/frontier", json=body)).json()["points"]
    assert all(point["solution"]["targets"]["words"] == 8 for point in points)


async def test_a_profile_of_other_values_is_told_when_it_is_used(running):
    store = running.context.aligner.layers.profiles
    store.put("old", {"targets": {"politeness": "keep"}})
    message = failed(await running.chat(palette={"profile": "old"}), 400, "unknown_value",
                     "palette.targets.politeness")  # fmt: skip
    assert message.startswith("profile old, version 1: ")
    store.put("old", {"goals": {}})
    message = failed(await running.chat(palette={"profile": "old"}), 500, "profiles_failed")
    assert "profile old, version 2: goals" in message


# chosen by the model's name


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("m", ("m", None)),
        ("m:p", ("m", "p")),
        ("m:7b", ("m:7b", None)),
        ("m:7b:p", ("m:7b", "p")),
        ("m:7bx", ("m", "7bx")),
        ("mp", ("mp", None)),
        ("other:p", ("other:p", None)),
        ("m:", ("m", "")),
    ],
)
def test_the_longest_model_name_counts(name, split):
    assert split_model(name, ["m", "m:7b"]) == split


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_name_chooses_a_profile(running, stream):
    await put(running, "brief", SHORT)
    reply = await running.chat(model="fake:brief", seed=1, stream=stream)
    assert reply.status_code == 200
    assert '"model":"fake:brief"' in reply.text
    assert '"profile":{"name":"brief","version":1}' in reply.text
    body = {"model": "fake:brief", "prompt": "a", "stream": stream}
    reply = await running.client.post("/v1/completions", json=body)
    assert '"profile":{"name":"brief","version":1}' in reply.text


async def test_a_palette_lies_over_the_profile_of_the_name(running):
    await put(running, "brief", SHORT)
    for palette in ({"candidates": 6}, {"candidates": 6, "profile": "brief"}):
        report = await report_of(running, model="fake:brief", palette=palette)
        assert (report["targets"], report["candidates"]) == ({"words": 8}, 6)


@pytest.mark.parametrize(
    ("palette", "param"), [(None, "palette"), ({"profile": "other"}, "palette.profile")]
)
async def test_a_palette_that_says_otherwise(running, palette, param):
    await put(running, "brief", SHORT)
    reply = await running.chat(model="fake:brief", palette=palette)
    assert "ask for model fake" in failed(reply, 400, "unsupported_parameter", param)


@pytest.mark.parametrize("name", ["fake:nope", "fake:", "other:brief", "fake:brief:x"])
async def test_models_that_are_not_there(running, name):
    await put(running, "brief", SHORT)
    failed(await running.chat(model=name), 404, "model_not_found", "model")
    body = {"model": name, "prompt": "a"}
    failed(await running.client.post("/v1/completions", json=body), 404, "model_not_found", "model")
    failed(await running.client.get(f"/v1/models/{name}"), 404, "model_not_found", "model")


async def test_models_with_their_profiles(running):
    await put(running, "brief", SHORT)
    await put(running, "again", SHORT)
    models = (await running.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["fake", "fake:again", "fake:brief"]
    for model in models:
        assert (await running.client.get(f"/v1/models/{model['id']}")).json() == model
    await running.client.delete(f"{URL}/again")
    models = (await running.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["fake", "fake:brief"]


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


async def test_without_floors_they_would(running):
    lengths = [
        len((await running.chat(seed=seed)).json()["choices"][0]["message"]["content"].split())
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
