from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_trials(monkeypatch):
    """Keep scorers that failed from being tried again in the middle of a test."""
    monkeypatch.setattr("rewards.trials.FIRST_PAUSE_S", 3600.0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return a function that gives the folder of a tiny model; made once per session."""
    from tests.rewards.tiny import make

    folders = {}

    def get(architecture, **options):
        key = (architecture, *sorted(options.items()))
        if key not in folders:
            folders[key] = make(architecture, tmp_path_factory.mktemp(architecture), **options)
        return folders[key]

    return get
