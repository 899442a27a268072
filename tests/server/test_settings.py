"""One configuration: arguments, then the environment, then defaults; what is wrong is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from server import embedded
from server.backends.base import SamplingSettings
from server.settings import PREFIX, Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


def test_defaults_are_safe():
    settings = load_settings()
    assert settings.host == "127.0.0.1"
    assert not settings.trust_remote_code
    assert not settings.insecure
    assert settings.api_keys == ()
    assert settings.default_palette is None
    assert settings.calibrate_at_start
    assert settings.candidates <= settings.max_candidates <= settings.max_rows
    assert settings.state_dir.is_absolute()
    assert settings.rewards == embedded.REWARDS
    assert settings.sampling == SamplingSettings()


def test_every_field_says_what_it_is_for():
    for name, field in Settings.model_fields.items():
        assert len(field.description or "") > 15, name


def test_arguments_come_before_the_environment(monkeypatch):
    monkeypatch.setenv("PALETTE_PORT", "9000")
    monkeypatch.setenv("PALETTE_CANDIDATES", "8")
    settings = load_settings(port=9001, candidates=None)
    assert (settings.port, settings.candidates) == (9001, 8)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MODEL", "some/model", "some/model"),
        ("TRUST_REMOTE_CODE", "true", True),
        ("CALIBRATE_AT_START", "0", False),
        ("TEMPERATURE", "0.7", 0.7),
        ("MAX_CONTEXT", "2048", 2048),
        ("STATE_DIR", "/var/lib/palette", Path("/var/lib/palette")),
        ("CALIBRATION", "/a/b.npz", Path("/a/b.npz")),
        ("LOG_LEVEL", "debug", "debug"),
        ("API_KEY_FILE", "/run/secrets/keys", Path("/run/secrets/keys")),
        ("INSECURE", "true", True),
        ("REQUEST_TIMEOUT_S", "2.5", 2.5),
        ("DRAIN_TIMEOUT_S", "0", 0),
        ("DEFAULT_PALETTE", '{"targets": {"words": "keep"}}', {"targets": {"words": "keep"}}),
    ],
)
def test_environment(monkeypatch, name, text, value):
    monkeypatch.setenv(PREFIX + name, text)
    assert getattr(load_settings(), name.lower()) == value


@pytest.mark.parametrize("name", ["PALETTE_MODLE", "PALETTE_", "PALETTE_model_x", "PALETTE_SEED"])
def test_unknown_variable_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert name in str(caught.value)
    assert "PALETTE_MODEL" in str(caught.value)


def test_unknown_argument_is_refused():
    with pytest.raises(SettingsError, match="modle"):
        load_settings(modle="x")


@pytest.mark.parametrize("name", ["palette_port", "Palette_Port"])
def test_variables_in_lower_case_count_too(monkeypatch, name):
    monkeypatch.setenv(name, "9000")
    assert load_settings().port == 9000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1), ("port", 65536), ("port", "http"), ("temperature", -0.1),
        ("temperature", 2.1), ("temperature", "nan"), ("top_p", 0), ("top_p", 1.1),
        ("top_k", -1), ("max_tokens", 0), ("candidates", 0), ("max_candidates", 0),
        ("max_candidates", 1025), ("max_context", 15), ("calibration_candidates", 1),
        ("calibration_candidates", 1025), ("max_rows", 0), ("max_running", 0),
        ("max_queue", -1), ("max_body_bytes", 1023), ("max_batch_tokens", 63),
        ("torch_threads", 0), ("keepalive_s", 0), ("request_timeout_s", 0),
        ("request_timeout_s", "nan"), ("drain_timeout_s", -1), ("api_keys", "a b"),
        ("insecure", "perhaps"), ("log_level", "loud"), ("log_level", "DEBUG "),
        ("default_palette", "{"), ("default_palette", "[]"), ("trust_remote_code", "perhaps"),
    ],
)  # fmt: skip
def test_bounds(monkeypatch, name, value):
    monkeypatch.setenv(PREFIX + name.upper(), str(value))
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert name in str(caught.value)
    assert "pydantic" not in str(caught.value)
    assert "Value error" not in str(caught.value)


def test_every_fault_is_told_at_once():
    with pytest.raises(SettingsError) as caught:
        load_settings(port=-1, top_p=0)
    assert "port" in str(caught.value)
    assert "top_p" in str(caught.value)


def test_contradiction_is_told_with_both_remedies():
    with pytest.raises(SettingsError) as caught:
        load_settings(candidates=32, max_candidates=16)
    told = str(caught.value)
    assert "candidates (32)" in told
    assert "max_candidates (16)" in told
    assert "lower" in told
    assert "raise" in told


def test_bounds_themselves_are_allowed():
    load_settings(port=0, temperature=0, top_p=1, top_k=0, max_tokens=1, candidates=1, max_queue=0)
    load_settings(port=65535, temperature=2, candidates=1024, max_candidates=1024)


@pytest.mark.parametrize(
    "palette",
    [{"target": {}}, {"targets": {}, "candidates": "many"}, {"targets": {}, "scope": "world"}],
)
def test_default_palette_of_another_shape_is_refused(palette):
    with pytest.raises(SettingsError, match=r"^default_palette: (target|candidates|scope)"):
        load_settings(default_palette=palette)


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        load_settings().port = 1


def test_sampling_is_what_requests_get_that_say_nothing():
    settings = load_settings(temperature=0.7, top_p=0.9, top_k=50, max_tokens=99)
    assert settings.sampling == SamplingSettings(0.7, 0.9, 50, 99)


def test_names_for_clients(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert load_settings().served_model_name == "palette-mini"
    assert load_settings(model="org/name").served_model_name == "org/name"
    assert load_settings(model=str(folder)).served_model_name == "my-model"
    assert load_settings(model=f"{folder}/").served_model_name == "my-model"
    assert load_settings(model="org/name", model_name="mine").served_model_name == "mine"


def test_model_in_the_current_folder_has_a_name(tmp_path, monkeypatch):
    folder = tmp_path / "my-model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert load_settings(model=".").served_model_name == "my-model"


@pytest.mark.parametrize("name", ["FLOORS", "ENGINE_ARGS"])
def test_what_is_no_json_is_told_by_the_variables_name(monkeypatch, name):
    monkeypatch.setenv(f"PALETTE_{name}", "{words: 1}")
    with pytest.raises(SettingsError, match=rf"^PALETTE_{name} is no JSON \(Expecting"):
        load_settings()


def test_a_default_palette_that_is_no_json(monkeypatch):
    monkeypatch.setenv("PALETTE_DEFAULT_PALETTE", "{words: 1}")
    with pytest.raises(SettingsError, match=r"^default_palette: must be a JSON object, quoted"):
        load_settings()
