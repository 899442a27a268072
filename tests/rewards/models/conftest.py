"""Remote scorers and the servers behind them, on real sockets."""

from __future__ import annotations

import pytest

from rewards import load_rewards
from tests.rewards.models.remote_upstream import ENTRIES, starting


@pytest.fixture
def serve():
    """Return a function that starts the upstream of an api."""
    with starting() as start:
        yield start


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a file with one remote and one lexical scorer."""

    def make(api, url, extra="", entry=None):
        path = tmp_path / "rewards.yaml"
        fields = [f"kind: remote, api: {api}, url: '{url}'", entry or ENTRIES[api], extra]
        path.write_text(
            f"version: 1\nscorers:\n  far: {{{', '.join(filter(None, fields))}}}\n"
            "  near: {kind: lexical, measure: words}\n"
            "values: {liked: {from: far}, words: {from: near}}\n"
        )
        return load_rewards(path)

    return make
