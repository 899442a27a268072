"""A chat model of a hub that cannot be reached: refused at once, or read from the cache."""

from __future__ import annotations

import os
import shutil
import time

import pytest
from huggingface_hub import constants

from rewards import hub
from server.backends import vllm_process
from server.backends.base import ModelLoadError
from server.backends.hf_loading import identify, load_model
from server.backends.vllm_text import load_text

COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    """Nobody listens at port 9; who asks again and again is found out by its sleeping."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("the hub was asked again"))


LOADERS = {
    "load_model": lambda name: load_model(name, device="cpu"),
    "load_text": lambda name: load_text(
        name, revision=None, max_context=None, trust_remote_code=False, has_weights=True
    ),
    "identify": lambda name: identify(name, None, False),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_what_is_not_downloaded_is_refused_in_one_line(load):
    with pytest.raises(ModelLoadError) as caught:
        load("nobody/nothing")
    told = str(caught.value)
    assert "'nobody/nothing': http://127.0.0.1:9 cannot be reached" in told
    assert "not downloaded" in told
    for remedy in ("folder", "HTTPS_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"):
        assert remedy in told
    assert "\n" not in told
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_what_is_downloaded_is_read(load, llama_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--nobody--tiny"
    shutil.copytree(llama_folder, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    found = load("nobody/tiny")
    assert getattr(found, "fingerprint", found) == identify("nobody/tiny", COMMIT, False)
    assert "only models that are downloaded already are used" in caplog.text


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_folder_needs_no_hub(load, llama_folder, caplog):
    assert load(str(llama_folder))
    assert not caplog.records


@pytest.mark.parametrize("is_folder", [False, True])
def test_the_engines_process_knows_that_the_hub_is_away(tmp_path, monkeypatch, is_folder):
    seen = []

    def construct(options):
        seen.append((constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")))
        raise RuntimeError("enough")

    monkeypatch.setattr(vllm_process, "_construct", construct)
    model = str(tmp_path) if is_folder else "nobody/nothing"
    with pytest.raises(ModelLoadError, match="enough"):
        vllm_process.start_engine({"model": model}, {})
    assert seen == [(False, None) if is_folder else (True, "1")]
    assert not constants.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ
