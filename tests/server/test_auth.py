"""Who comes in: keys, where they are read from, and that nobody ever sees them."""

from __future__ import annotations

import hmac
import json
import logging
import os
import subprocess
import sys

import openai
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from server import auth, cli, routes
from server.app import running_app
from server.settings import PREFIX, SettingsError, load_settings
from tests.server.conftest import chat_body, run_fake
from tests.server.fakes import FakeBackend, lexical_rewards

KEYS = ("sk-first-0123456789", "sk-second-0123456789", "sk-third-0123456789")
OPERATORS = ("sk-operator-0123456789", "sk-other-operator-0123456789")
PROFILE = "/v1/palette/profiles/brief"
WRITES = ("PUT", "DELETE", "PATCH", "MKCOL", "put")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


@pytest.fixture
def locked(settings):
    return settings.model_copy(update={"api_keys": tuple(map(SecretStr, KEYS))})


@pytest.fixture
def operated(locked):
    return locked.model_copy(update={"operator_keys": tuple(map(SecretStr, OPERATORS))})


def bearer(key):
    return {"authorization": f"Bearer {key}"}


# the door


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_need_no_key(tmp_path, locked, path):
    async with run_fake(tmp_path, locked) as running:
        assert (await running.client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/models/fake", "/v1/palette/values", "/v1/chat/completions", "/version",
     "/metrics", "/docs", "/openapi.json", "/nothing", "/v1/nothing", "/health/", "//health",
     "/ready/x", "/HEALTH", "/health%2f", "/v1/../v1/models"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_nothing_else_is_to_be_had_without_a_key(tmp_path, locked, path, method):
    async with run_fake(tmp_path, locked) as running:
        reply = await running.client.request(method, path)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.headers["x-request-id"].startswith("req_")
        error = reply.json()["error"]
        assert (error["type"], error["code"], error["param"]) == (
            "invalid_request_error", "invalid_api_key", None,
        )  # fmt: skip
        assert "Authorization: Bearer" in error["message"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
async def test_every_key_opens(tmp_path, locked, key, scheme):
    async with run_fake(tmp_path, locked) as running:
        headers = {"authorization": f"{scheme} {key}"}
        reply = await running.client.post("/v1/chat/completions", json=chat_body(), headers=headers)
        assert reply.status_code == 200
        assert (await running.client.get("/nothing", headers=headers)).status_code == 404


@pytest.mark.parametrize(
    "value",
    [b"", b"Bearer", b"Bearer ", KEYS[0].encode(), b"Basic " + KEYS[0].encode(),
     b"Bearer " + KEYS[0][:-1].encode(), b"Bearer " + KEYS[0].encode() + b"x",
     b"Bearer " + KEYS[0].upper().encode(), b"Bearer x" + KEYS[0].encode(),
     b"Bearer " + ",".join(KEYS).encode(), b"Bearer " + KEYS[0].encode() + b" " + KEYS[1].encode(),
     b"Bearer \xff\xfe\x80", b"Bearer **********", b"Bearer " + b"x" * 60_000],
    ids=range(14),
)  # fmt: skip
async def test_other_keys_do_not(tmp_path, locked, value):
    async with run_fake(tmp_path, locked) as running:
        reply = await running.client.post(
            "/v1/chat/completions", json=chat_body(), headers=[(b"authorization", value)]
        )
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert running.backend.n_started == 0


@pytest.mark.parametrize("keys", [KEYS[:2], (KEYS[0], "wrong"), ("wrong", KEYS[0])])
async def test_two_headers_are_refused(tmp_path, locked, keys):
    async with run_fake(tmp_path, locked) as running:
        headers = [("authorization", f"Bearer {key}") for key in keys]
        assert (await running.client.get("/v1/models", headers=headers)).status_code == 401


async def test_without_keys_nobody_is_asked(running):
    assert (await running.chat()).status_code == 200
    reply = await running.client.get("/v1/models", headers=bearer("whatever"))
    assert reply.status_code == 200


@pytest.mark.parametrize(("key", "status"), [(KEYS[0], 200), (KEYS[2], 200), ("k", 401)])
async def test_all_keys_are_compared_in_constant_time(tmp_path, locked, compared, key, status):
    """However early one fits, and at equal lengths: the time tells nothing."""
    async with run_fake(tmp_path, locked) as running:
        reply = await running.client.get("/v1/models", headers=bearer(key))
        assert reply.status_code == status
    assert compared == [(32, 32)] * len(KEYS)


@pytest.fixture
def compared(monkeypatch):
    """Return the lengths of what is compared, in order."""
    found = []

    def compare(one, other):
        found.append((len(one), len(other)))
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    return found


# who may change what is stored


@pytest.mark.parametrize("key", [*OPERATORS, *KEYS])
async def test_an_operators_key_opens_as_any_other(tmp_path, operated, key):
    async with run_fake(tmp_path, operated) as running:
        reply = await running.client.post(
            "/v1/chat/completions", json=chat_body(), headers=bearer(key)
        )
        assert reply.status_code == 200
        for path in ("/v1/models", "/metrics", "/v1/palette/profiles"):
            reply = await running.client.get(path, headers=bearer(key))
            assert reply.status_code == 200


@pytest.mark.parametrize("key", OPERATORS)
async def test_operators_may_write_and_delete(tmp_path, operated, key):
    async with run_fake(tmp_path, operated) as running:
        written = await running.client.put(PROFILE, json={"palette": {}}, headers=bearer(key))
        assert written.status_code == 200
        assert (await running.client.delete(PROFILE, headers=bearer(key))).status_code == 200


@pytest.mark.parametrize("method", WRITES)
@pytest.mark.parametrize("path", [PROFILE, "/v1/models", "/nothing", "/health/"])
async def test_others_may_not_and_are_told_what_to_do(tmp_path, operated, method, path):
    async with run_fake(tmp_path, operated) as running:
        stored = {"palette": {}, "description": "stays"}
        await running.client.put(PROFILE, json=stored, headers=bearer(OPERATORS[0]))
        for key in KEYS:
            reply = await running.client.request(method, path, headers=bearer(key), content=b"{")
            assert reply.status_code == 403
            error = reply.json()["error"]
            assert (error["type"], error["code"], error["param"]) == (
                "invalid_request_error", "permission_denied", None,
            )  # fmt: skip
            for remedy in ("PALETTE_OPERATOR_KEYS", "PALETTE_OPERATOR_KEY_FILE"):
                assert remedy in error["message"]
        for headers in ({}, bearer("sk-unknown")):
            reply = await running.client.request(method, path, headers=headers)
            assert reply.status_code == 401
        kept = (await running.client.get(PROFILE, headers=bearer(KEYS[0]))).json()
        assert (kept["description"], kept["version"]) == ("stays", 1)


def test_a_route_that_writes_has_a_method_that_says_so():
    """A new POST belongs here only if it leaves what is stored as it is."""
    asking = {
        "/v1/chat/completions", "/v1/completions", "/v1/palette/solve", "/v1/palette/score",
        "/v1/palette/replay", "/v1/palette/frontier", "/v1/palette/spread",
        "/v1/palette/negotiate",
    }  # fmt: skip
    found = {
        (method, route.path)
        for module in vars(routes).values()
        for route in getattr(getattr(module, "router", None), "routes", ())
        for method in route.methods
    }
    reading = {(method, path) for method, path in found if method in auth.READING_METHODS}
    assert {path for method, path in reading if method not in ("GET", "HEAD")} == asking
    assert {method for method, _ in found - reading} == {"PUT", "DELETE"}


async def test_the_operators_client_raises_the_official_class(tmp_path, operated):
    async with run_fake(tmp_path, operated) as running:
        client = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key=KEYS[0], http_client=running.client, max_retries=0
        )
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await client.put("/palette/profiles/brief", body={"palette": {}}, cast_to=object)
        assert caught.value.code == "permission_denied"


@pytest.mark.parametrize(
    ("operators", "clients"), [(OPERATORS, ()), (OPERATORS, KEYS), (KEYS[:1], KEYS)]
)
async def test_operators_alone_need_no_other_key(tmp_path, settings, operators, clients):
    changed = {
        "operator_keys": tuple(map(SecretStr, operators)),
        "api_keys": tuple(map(SecretStr, clients)),
    }
    async with run_fake(tmp_path, settings.model_copy(update=changed)) as running:
        assert (await running.client.get("/v1/models")).status_code == 401
        reply = await running.client.get("/v1/models", headers=bearer(operators[0]))
        assert reply.status_code == 200
        reply = await running.client.put(
            PROFILE, json={"palette": {}}, headers=bearer(operators[0])
        )
        assert reply.status_code == 200


@pytest.mark.parametrize("key", [*KEYS, None])
async def test_without_operators_who_comes_in_may_write(tmp_path, settings, locked, key):
    headers = {} if key is None else bearer(key)
    async with run_fake(tmp_path, settings if key is None else locked) as running:
        written = await running.client.put(PROFILE, json={"palette": {}}, headers=headers)
        assert written.status_code == 200
        assert (await running.client.delete(PROFILE, headers=headers)).status_code == 200


@pytest.mark.parametrize(("key", "status"), [(OPERATORS[0], 404), (KEYS[0], 403)])
async def test_a_write_compares_all_operators_keys_too(tmp_path, operated, compared, key, status):
    async with run_fake(tmp_path, operated) as running:
        reply = await running.client.delete(PROFILE, headers=bearer(key))
        assert reply.status_code == status
    assert compared == [(32, 32)] * (len(KEYS) + 2 * len(OPERATORS))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "no key is asked for"),
        ({"api_keys": [KEYS[0]]}, "every API key may write"),
        ({"api_keys": [KEYS[0]], "operator_keys": [OPERATORS[0]]}, "only operators' keys"),
        ({"operator_keys": [OPERATORS[0]]}, "only operators' keys"),
    ],
)
async def test_the_log_says_who_may_write(tmp_path, caplog, fields, told):
    caplog.set_level(logging.INFO)
    settings = load_settings(state_dir=tmp_path, calibrate_at_start=False, **fields)
    async with run_fake(tmp_path, settings):
        pass
    assert len([line for line in caplog.messages if told in line and "profiles" in line]) == 1
    assert ("PALETTE_OPERATOR_KEYS" in caplog.text) == ("operator_keys" not in fields)


# secrecy


async def test_keys_are_shown_nowhere(tmp_path, operated, caplog):
    caplog.set_level(logging.DEBUG)
    shown = [repr(operated), str(operated), repr(operated.api_keys), operated.model_dump_json()]
    shown.append(repr(auth.read_keys(operated)))
    async with run_fake(tmp_path, operated) as running:
        running.backend.failure = KeyError("x")
        for key in (KEYS[1], f"{KEYS[1]}x", OPERATORS[0], f"{OPERATORS[0]}x"):
            reply = await running.client.delete(PROFILE, headers=bearer(key))
            shown += [reply.text, repr(reply.headers)]
            for path in ("/v1/models", "/openapi.json", "/docs", "/version", "/metrics", "/ready"):
                reply = await running.client.get(path, headers=bearer(key))
                shown += [reply.text, repr(reply.headers)]
            reply = await running.client.post(
                "/v1/chat/completions", json=chat_body(), headers=bearer(key)
            )
            shown.append(reply.text)
        shown.append(repr(running.context))
        shown += [repr(vars(layer)) for layer in layers(running.app)]
    shown.append(caplog.text)
    assert len(caplog.records) > 10
    for text in shown:
        assert not [key for key in (*KEYS, *OPERATORS) if key in text]


def layers(app):
    layer = app.middleware_stack
    while layer is not None:
        yield layer
        layer = getattr(layer, "app", None)


@pytest.mark.parametrize("setting", ["api_keys", "operator_keys"])
@pytest.mark.parametrize("key", ["sk with-space", "sk-schlüssel", "sk-\ttab", ""])
def test_a_bad_key_is_refused_and_not_shown(monkeypatch, key, setting):
    monkeypatch.setenv(f"PALETTE_{setting.upper()}", json.dumps([KEYS[0], key]))
    with pytest.raises(SettingsError, match=f"{setting}.*printable ASCII") as caught:
        load_settings(port=-1)
    for text in (str(caught.value), repr(caught.value), str(caught.value.__cause__)):
        assert KEYS[0] not in text
        assert not key or key not in text


def test_contradicting_settings_do_not_show_keys():
    with pytest.raises(SettingsError) as caught:
        load_settings(api_keys=[KEYS[0]], candidates=9, max_candidates=8)
    assert KEYS[0] not in str(caught.value.__cause__)
    assert KEYS[0] not in repr(caught.value.__cause__)


# where keys come from


@pytest.mark.parametrize(
    "text", [",".join(KEYS), " , ".join(KEYS), json.dumps(KEYS), f" {json.dumps(KEYS)}"]
)
@pytest.mark.parametrize("setting", ["api_keys", "operator_keys"])
def test_keys_of_the_environment(monkeypatch, text, setting):
    monkeypatch.setenv(f"PALETTE_{setting.upper()}", text)
    assert texts(getattr(load_settings(), setting)) == KEYS


def texts(keys):
    return tuple(key.get_secret_value() for key in keys)


@pytest.mark.parametrize("text", ["", " ", ",", f"{KEYS[0]},", "[]x", '["a"', "[1]"])
@pytest.mark.parametrize("setting", ["api_keys", "operator_keys"])
def test_an_empty_variable_is_no_open_door(monkeypatch, text, setting):
    monkeypatch.setenv(f"PALETTE_{setting.upper()}", text)
    with pytest.raises(SettingsError, match=setting) as caught:
        load_settings()
    assert KEYS[0] not in str(caught.value)


def test_keys_of_the_file_and_of_the_settings(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(f"# a comment\n\n  {KEYS[1]}  \r\n{KEYS[2]}\n#{KEYS[0]}\n")
    path.chmod(0o600)
    keys = auth.read_keys(load_settings(api_keys=[KEYS[0]], api_key_file=path))
    assert (texts(keys.clients), texts(keys.operators)) == (KEYS, ())
    keys = auth.read_keys(load_settings(operator_keys=[KEYS[0]], operator_key_file=path))
    assert (texts(keys.clients), texts(keys.operators)) == ((), KEYS)
    assert caplog.records == []


async def test_keys_of_the_file_open(tmp_path, settings):
    path = tmp_path / "keys"
    path.write_text(KEYS[0])
    path.chmod(0o600)
    with_file = settings.model_copy(update={"api_key_file": path})
    async with run_fake(tmp_path, with_file) as running:
        assert (await running.client.get("/v1/models")).status_code == 401
        reply = await running.client.get("/v1/models", headers=bearer(KEYS[0]))
        assert reply.status_code == 200


def test_a_file_that_everybody_can_read_is_told(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(KEYS[0])
    path.chmod(0o644)
    assert auth.read_keys(load_settings(api_key_file=path))
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "No such file"), (b"", "no key"), (b"# only\n\n", "no key"),
     (b"sk-one two\n", "cannot be used"), (b"sk-\xff\xfe\n", "cannot be used")],
)  # fmt: skip
@pytest.mark.parametrize("setting", ["api_key_file", "operator_key_file"])
def test_a_file_without_keys_stops_the_start(tmp_path, content, told, setting):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(SettingsError, match=told) as caught:
        auth.read_keys(load_settings(**{setting: path}))
    assert f"{setting}: {path}" in str(caught.value)
    assert "sk-" not in str(caught.value)


# beyond this machine


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org", "", "127.0.0.1.x"])
def test_other_machines_need_a_key(host):
    with pytest.raises(SettingsError) as caught:
        auth.read_keys(load_settings(host=host))
    for remedy in ("PALETTE_API_KEYS", "--api-key-file", "--insecure"):
        assert remedy in str(caught.value)
    assert auth.read_keys(load_settings(host=host, api_keys=[KEYS[0]])).clients
    assert auth.read_keys(load_settings(host=host, operator_keys=[KEYS[0]])).operators
    assert auth.read_keys(load_settings(host=host, insecure=True)) == auth.Keys()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_needs_none(host):
    assert auth.read_keys(load_settings(host=host)) == auth.Keys()


async def test_an_open_server_is_refused_before_models_are_loaded(tmp_path, settings):
    backend = FakeBackend()
    wide = settings.model_copy(update={"host": "0.0.0.0"})
    with pytest.raises(SettingsError):
        async with running_app(wide, backend=backend, rewards=lexical_rewards(tmp_path)):
            pass
    assert not backend.is_up


# the command


def test_options_of_the_command(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("server.serving.run_server", lambda settings: given.append(settings) or 0)
    path = tmp_path / "keys"
    path.write_text(KEYS[2])
    words = ["--api-key", KEYS[0], "--api-key", KEYS[1], "--api-key-file", str(path), "--insecure"]
    words += ["--request-timeout", "7", "--drain-timeout", "3"]
    words += ["--operator-key", OPERATORS[0], "--operator-key-file", str(path)]
    done = CliRunner().invoke(cli.app, ["serve", *words])
    assert done.exit_code == 0
    (settings,) = given
    assert tuple(key.get_secret_value() for key in settings.api_keys) == KEYS[:2]
    assert texts(settings.operator_keys) == OPERATORS[:1]
    assert settings.operator_key_file == path
    assert (settings.api_key_file, settings.insecure) == (path, True)
    assert (settings.request_timeout_s, settings.drain_timeout_s) == (7, 3)


def test_a_bad_key_of_the_command_is_not_shown(tmp_path):
    done = CliRunner().invoke(cli.app, ["serve", "--api-key", "sk bad"])
    assert done.exit_code == 2
    assert "api_keys" in done.output
    assert "sk bad" not in done.output


def test_an_open_server_is_bad_usage():
    command = [sys.executable, "-m", "server", "serve", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "--insecure" in done.stderr
    assert "Traceback" not in done.stderr
