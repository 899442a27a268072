"""Calibrations made up for tests, and shelves of them."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from rewards import Message
from server.backends.base import SamplingSettings
from server.calibration import NO_SYSTEM, Calibration, folder_of, system_of
from server.shelf import Shelf, load_shelf
from server.shelf_files import Held
from solver import PilotSet
from tests.server.conftest import fake_calibration

VALUES = ("words", "variety", "log_likelihood")
MODEL = "f" * 64
PALETTE = {"targets": {"words": {"gain": 0.2}}, "candidates": 4}
SUPPORT, LEGAL = "You help with orders.", "You are a lawyer."
DAY = datetime(2026, 1, 1, tzinfo=UTC)


def asked(system=None):
    head = [] if system is None else [Message(role="system", content=system)]
    return [*head, Message(role="user", content="Tell me more.")]


def hashed(system=None):
    return system_of(asked(system))


def made(seed=0, values=VALUES, **info):
    """Return a small calibration of the fakes; other seeds are other calibrations."""
    rewards = np.random.default_rng(seed).normal(size=(16, 8, len(values)))
    info = {"systems": {NO_SYSTEM: 16}, "longest_answer_tokens": 21, "truncated_share": 0.0} | info
    return Calibration(PilotSet(rewards, values), fake_calibration().info.model_copy(update=info))


def shelf_of(*calibrations, **options):
    return Shelf([Held(one) for one in calibrations], **options)


def keep(settings, *calibrations):
    for number, one in enumerate(calibrations):
        one.save(folder_of(settings.state_dir) / f"{number}.npz")


def load(tmp_path, named=None, **changes):
    """Return the shelf of a server of the fakes that starts on this folder."""
    options = {
        "values": VALUES,
        "model_fingerprint": MODEL,
        "rewards_fingerprint": fake_calibration().info.rewards_fingerprint,
        "sampling": SamplingSettings(),
    }
    return load_shelf(named, tmp_path / "state", tmp_path / "shipped.npz", **options | changes)


def found(shelf):
    """Return what stands on a shelf: ids, and where each is from."""
    return {(one.calibration.id, one.source) for one in shelf.held}
