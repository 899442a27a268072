"""Profiles over HTTP: written, read, listed, deleted, and kept over a restart."""

from __future__ import annotations

import pytest
from fastapi.openapi.models import OpenAPI

from server.profile_file import ProfileFileError
from server.profiles import FILE
from tests.server.conftest import failed, run_fake
from tests.server.profile_calls import SHORT, URL, get, put


async def test_write_read_and_list(able):
    written = (await put(able, "brief", SHORT, description="Few words.")).json()
    assert written == {
        "object": "palette.profile",
        "name": "brief",
        "version": 1,
        "palette": SHORT,
        "description": "Few words.",
        "created": written["created"],
        "deleted": False,
    }
    assert (await get(able, "/brief")).json() == written
    assert (await get(able)).json() == {"object": "list", "data": [written]}
    second = (await put(able, "brief", {"targets": {}})).json()
    assert second["version"] == 2
    assert (await get(able, "/brief")).json() == second
    assert (await get(able, "/brief?version=1")).json() == written
    assert (await get(able, "/brief/versions")).json()["data"] == [second, written]
    assert (await get(able)).json()["data"] == [second]


async def test_delete_keeps_history(able):
    written = (await put(able, "brief", SHORT)).json()
    reply = await able.client.delete(f"{URL}/brief")
    assert reply.status_code == 200
    deletion = reply.json()
    assert (deletion["version"], deletion["palette"], deletion["deleted"]) == (2, None, True)
    failed(await get(able, "/brief"), 404, "profile_not_found")
    failed(await able.client.delete(f"{URL}/brief"), 404, "profile_not_found")
    assert (await get(able)).json()["data"] == []
    assert (await get(able, "/brief?version=1")).json() == written
    assert (await get(able, "/brief/versions")).json()["data"] == [deletion, written]
    failed(await able.chat(palette={"profile": "brief"}), 404, "profile_not_found",
           "palette.profile")  # fmt: skip


async def test_an_update_made_for_another_version(able):
    assert (await put(able, "brief", SHORT, expected_version=0)).status_code == 200
    reply = await put(able, "brief", SHORT, expected_version=0)
    assert "at version 1" in failed(reply, 409, "version_conflict", "expected_version")
    assert (await put(able, "brief", SHORT, expected_version=1)).json()["version"] == 2
    reply = await able.client.delete(f"{URL}/brief?expected_version=1")
    failed(reply, 409, "version_conflict", "expected_version")
    reply = await able.client.delete(f"{URL}/brief?expected_version=2")
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
async def test_what_is_no_palette_is_not_stored(able, palette, status, code, param):
    asked = await able.chat(palette=palette)
    message = failed(await put(able, "brief", palette), status, code, param)
    if code == "unknown_value":
        assert message == failed(asked, status, code, param)
    failed(await get(able, "/brief"), 404, "profile_not_found")


@pytest.mark.parametrize("name", ["a b", "a:b", ".x", "x" * 65, "%C3%A4"])
async def test_names_that_are_none(able, name):
    failed(await put(able, name, SHORT), 400, "invalid_value", "name")
    failed(await get(able, f"/{name}"), 404, "profile_not_found")


@pytest.mark.parametrize("query", ["version=0", "version=x", f"version={2**63}"])
async def test_versions_that_are_none(able, query):
    await put(able, "brief", SHORT)
    failed(await get(able, f"/brief?{query}"), 400, "invalid_value", "version")
    failed(await get(able, "/brief?version=2"), 404, "profile_not_found")


@pytest.mark.parametrize("name", ["nope", "a/b", "", "\x00", "x" * 257])
async def test_a_profile_that_is_not_there(able, name):
    reply = await able.chat(palette={"profile": name})
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


async def test_openapi_describes_them(able):
    schema = (await able.client.get("/openapi.json")).json()
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
