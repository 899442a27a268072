"""Profiles under requests: chosen by field or by the model's name, with palettes over them."""

from __future__ import annotations

import pytest

from server.layers import laid_over, split_model
from server.schemas import PaletteOptions
from tests.server.conftest import failed
from tests.server.profile_calls import SHORT, URL, put, report_of

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


async def test_a_profile_is_what_its_palette_is(able):
    await put(able, "brief", {})
    await put(able, "brief", SHORT)
    report = await report_of(able, palette={"profile": "brief"})
    assert report.pop("profile") == {"name": "brief", "version": 2}
    alone = await report_of(able, palette=SHORT)
    assert alone.pop("profile") is None
    assert {**report, "timing_ms": None} == {**alone, "timing_ms": None}
    # What was written later is not what was served before.
    await put(able, "brief", {"targets": {"words": {"at_least": 13}}})
    assert (await report_of(able, palette={"profile": "brief"}))["targets"] == {"words": 13}


async def test_fields_of_the_request_lie_over_it(able):
    await put(able, "brief", {**SHORT, "floors": {"words": 2}, "report": "full"})
    over = {"targets": {"variety": "keep"}, "candidates": 6, "floors": {"words": 5}}
    report = await report_of(able, palette={"profile": "brief", **over})
    assert set(report["targets"]) == {"words", "variety"}
    detail = report["candidates_detail"]
    assert len(detail) == report["candidates"] == 6
    assert all(one["weight"] == 0 for one in detail if one["rewards"]["words"] < 5)


async def test_a_profile_on_all_routes(able):
    await put(able, "brief", SHORT)
    wanted = {"profile": "brief"}
    promised = (await report_of(able, palette=wanted))["multipliers"]
    reply = await able.client.post("/v1/palette/solve", json={"palette": wanted})
    assert reply.json()["multipliers"] == pytest.approx(promised)
    assert reply.json()["profile"] == {"name": "brief", "version": 1}
    body = {"model": "fake", "prompt": ["a", "b"], "palette": wanted, "seed": 1}
    reports = (await able.client.post("/v1/completions", json=body)).json()["palette"]
    assert [report["profile"]["name"] for report in reports] == ["brief", "brief"]
    body = {"values": ["variety", "log_likelihood"], "palette": wanted, "points": 3}
    points = (await able.client.post("/v1/palette/frontier", json=body)).json()["points"]
    assert all(point["solution"]["targets"]["words"] == 8 for point in points)


async def test_a_profile_of_other_values_is_told_when_it_is_used(able):
    store = able.context.aligner.layers.profiles
    store.put("old", {"targets": {"politeness": "keep"}})
    message = failed(await able.chat(palette={"profile": "old"}), 400, "unknown_value",
                     "palette.targets.politeness")  # fmt: skip
    assert message.startswith("profile old, version 1: ")
    store.put("old", {"goals": {}})
    message = failed(await able.chat(palette={"profile": "old"}), 500, "profiles_failed")
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
async def test_a_model_name_chooses_a_profile(able, stream):
    await put(able, "brief", SHORT)
    reply = await able.chat(model="fake:brief", seed=1, stream=stream)
    assert reply.status_code == 200
    assert '"model":"fake:brief"' in reply.text
    assert '"profile":{"name":"brief","version":1}' in reply.text
    body = {"model": "fake:brief", "prompt": "a", "stream": stream}
    reply = await able.client.post("/v1/completions", json=body)
    assert '"profile":{"name":"brief","version":1}' in reply.text


async def test_a_palette_lies_over_the_profile_of_the_name(able):
    await put(able, "brief", SHORT)
    for palette in ({"candidates": 6}, {"candidates": 6, "profile": "brief"}):
        report = await report_of(able, model="fake:brief", palette=palette)
        assert (report["targets"], report["candidates"]) == ({"words": 8}, 6)


@pytest.mark.parametrize(
    ("palette", "param"), [(None, "palette"), ({"profile": "other"}, "palette.profile")]
)
async def test_a_palette_that_says_otherwise(able, palette, param):
    await put(able, "brief", SHORT)
    reply = await able.chat(model="fake:brief", palette=palette)
    assert "ask for model fake" in failed(reply, 400, "unsupported_parameter", param)


@pytest.mark.parametrize("name", ["fake:nope", "fake:", "other:brief", "fake:brief:x"])
async def test_models_that_are_not_there(able, name):
    await put(able, "brief", SHORT)
    failed(await able.chat(model=name), 404, "model_not_found", "model")
    body = {"model": name, "prompt": "a"}
    failed(await able.client.post("/v1/completions", json=body), 404, "model_not_found", "model")
    failed(await able.client.get(f"/v1/models/{name}"), 404, "model_not_found", "model")


async def test_models_with_their_profiles(able):
    await put(able, "brief", SHORT)
    await put(able, "again", SHORT)
    models = (await able.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["fake", "fake:again", "fake:brief"]
    for model in models:
        assert (await able.client.get(f"/v1/models/{model['id']}")).json() == model
    await able.client.delete(f"{URL}/again")
    models = (await able.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["fake", "fake:brief"]
