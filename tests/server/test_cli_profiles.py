"""``palette profile``: the same store as the server's, checked by the same rules."""

from __future__ import annotations

import json

import pytest

from server.profiles import FILE, Profiles
from tests.server.commands import BAD_USAGE, DONE, FAILED, one_line, palette
from tests.server.conftest import run_fake
from tests.server.fakes import LEXICAL_REWARDS

pytestmark = pytest.mark.usefixtures("_clean_environment")
BRIEF = {"targets": {"words": {"at_most": 40}}}


@pytest.fixture
def store(tmp_path):
    """Return the store of the state directory that the environment names."""
    profiles = Profiles(tmp_path / "state" / FILE)
    yield profiles
    profiles.close()


def profile(*arguments, code=DONE):
    result = palette("profile", *arguments)
    assert result.exit_code == code, result.output
    return result.stdout


def as_json(*arguments):
    return json.loads(profile(*arguments, "--json"))


def put(name="brief", wanted=BRIEF, *options):
    return as_json("set", name, "--palette", json.dumps(wanted), *options)


def test_set_show_list_and_delete(store):
    first = put("brief", BRIEF, "--description", "Few words.")
    assert (first["version"], first["palette"], first["description"]) == (1, BRIEF, "Few words.")
    second = put("brief", {"targets": {"helpful": "keep"}})
    assert as_json("show", "brief") == second
    assert as_json("show", "brief", "--version", 1) == first
    assert as_json("show", "brief", "--versions") == [second, first]
    put("another")
    assert [one["name"] for one in as_json("list")] == ["another", "brief"]
    deletion = as_json("delete", "brief")
    assert (deletion["version"], deletion["palette"]) == (3, None)
    assert [one["name"] for one in as_json("list")] == ["another"]
    assert as_json("show", "brief", "--versions") == [deletion, second, first]
    assert store.get("another").palette == BRIEF


def test_lines_for_people(store):
    store.put("brief", BRIEF, "Few words.")
    store.put("old", BRIEF)
    store.delete("old")
    (line,) = profile("list").splitlines()
    assert line.startswith("brief  version 1  ")
    assert line.endswith(f"  {json.dumps(BRIEF)}  Few words.")
    assert profile("show", "brief") == f"{line}\n"
    assert "deleted" in profile("show", "old", "--versions").splitlines()[0]


def test_nothing_there_yet(store):
    assert profile("list") == ""
    assert as_json("list") == []
    assert not store.path.exists()


def test_another_state_directory(tmp_path, store):
    put("brief", BRIEF, "--state-dir", tmp_path / "other")
    assert store.newest() == []
    assert [one["name"] for one in as_json("list", "--state-dir", tmp_path / "other")] == ["brief"]


async def test_a_running_server_sees_it_at_once(tmp_path, settings):
    path = tmp_path / "fake.yaml"
    path.write_text(LEXICAL_REWARDS)
    async with run_fake(tmp_path, settings) as running:
        assert (await running.client.get("/v1/palette/profiles")).json()["data"] == []
        wanted = {"targets": {"words": {"at_most": 8}}}
        put("brief", wanted, "--state-dir", settings.state_dir, "--rewards", path)
        reply = await running.chat(model="fake:brief")
        assert reply.json()["palette"]["profile"] == {"name": "brief", "version": 1}
        profile("delete", "brief", "--state-dir", settings.state_dir)
        assert (await running.chat(model="fake:brief")).status_code == 404


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("--palette", "JSON")),
        ("null", ("--palette", "null")),
        ('{"goals": {}}', ("--palette", "goals")),
        ('{"targets": {"wrods": "keep"}}', ("wrods", "words", "Did you mean")),
        ('{"targets": {"words": 3}}', ("targets.words",)),
        ('{"profile": "other"}', ("cannot lie on another",)),
    ],
)
def test_what_is_no_palette(store, text, words):
    one_line(palette("profile", "set", "brief", "--palette", text), BAD_USAGE, *words)
    assert not store.path.exists()


def test_the_operators_floors_count_here_too(monkeypatch, store):
    monkeypatch.setenv("PALETTE_FLOORS", '{"harmless": -1}')
    text = json.dumps({"on_floor": "best"})
    one_line(palette("profile", "set", "brief", "--palette", text), BAD_USAGE, "leave on_floor out")
    assert put()["version"] == 1


def test_values_of_another_file(tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text(LEXICAL_REWARDS)
    wanted = {"targets": {"variety": "keep"}}
    assert put("varied", wanted, "--rewards", path)["palette"] == wanted
    text = json.dumps(wanted)
    one_line(palette("profile", "set", "varied", "--palette", text), BAD_USAGE, "variety")


def test_names_that_are_none():
    text = json.dumps(BRIEF)
    one_line(palette("profile", "set", "a b", "--palette", text), BAD_USAGE, "64 letters")


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "nope"),
        ("show", "nope", "--versions"),
        ("show", "brief", "--version", 2),
        ("delete", "nope"),
    ],
)
def test_what_is_not_there(arguments):
    put()
    one_line(palette("profile", *arguments), FAILED, "there is no profile")


def test_an_update_made_for_another_version():
    put("brief", BRIEF, "--expected-version", 0)
    options = ("--expected-version", 0)
    text = json.dumps(BRIEF)
    result = palette("profile", "set", "brief", "--palette", text, *options)
    one_line(result, FAILED, "at version 1")
    one_line(palette("profile", "delete", "brief", *options), FAILED, "at version 1")
    assert put("brief", BRIEF, "--expected-version", 1)["version"] == 2


def test_a_damaged_file(store):
    store.path.parent.mkdir()
    store.path.write_text("no profiles at all\n" * 100)
    one_line(palette("profile", "list"), FAILED, "left as it is", str(store.path))


def test_both_version_and_versions():
    one_line(palette("profile", "show", "a", "--version", 1, "--versions"), BAD_USAGE, "--version")


@pytest.mark.parametrize("name", ["list", "show", "set", "delete"])
def test_help_of_each_has_an_example(name):
    told = profile(name, "--help")
    assert f"palette profile {name}" in told.split("Example")[1]


def test_help_lists_them():
    told = profile("--help")
    assert all(f" {name} " in told for name in ("list", "show", "set", "delete"))
    assert " profile " in palette("--help").stdout
