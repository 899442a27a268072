"""The command: on the shipped chat model with rewards that need none, killed and continued."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest

from server import embedded
from tests.server.test_cli_models import (
    PATIENCE_S,
    _environment,  # noqa: F401  # a fixture for every test
    ending,
    palette,
    start,
)

N_PROMPTS = 24
PALETTES = ["--palette", '{"targets": {"words": {"gain": 0.3}}}']
INFEASIBLE = ["--palette", '{"targets": {"words": {"at_least": 500}}}']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with prompts to calibrate on and others to evaluate on."""
    folder = tmp_path_factory.mktemp("evaluated")
    lines = embedded.PROMPTS.read_text(encoding="utf-8").splitlines()
    for name, part in (("calibration", lines[:20]), ("heldout", lines[20 : 20 + N_PROMPTS])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def calibration(folder):
    path = folder / "calibration.npz"
    if not path.exists():
        told = palette(
            "calibrate", "--prompts", folder / "calibration.jsonl", "--candidates", 4, "--out", path
        )
        assert told.exit_code == 0, told.stderr
    return path


@pytest.fixture
def command(folder, calibration):
    return [
        "evaluate", folder / "heldout.jsonl", "--candidates", 4, "--concurrency", 2,
        "--calibration", calibration, *PALETTES, "--out",
    ]  # fmt: skip


def lines(folder):
    text = (folder / "candidates.jsonl").read_text(encoding="utf-8")
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda one: one["index"])


def assert_same(first, second):
    """Prompts decoded side by side round their sums differently: likelihoods to 6 digits."""
    assert [one["index"] for one in first] == [one["index"] for one in second]
    for one, other in zip(first, second, strict=True):
        assert one["words"] == other["words"]
        assert one["tokens"] == other["tokens"]
        for name, column in one["rewards"].items():
            np.testing.assert_allclose(column, other["rewards"][name], rtol=1e-4)


def test_killed_and_continued_loses_nothing(command, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    told = palette(*command, whole, "--json")
    assert told.exit_code == 0, told.stderr
    report = json.loads(told.stdout)
    assert told.stderr == f"report written to {whole}\n"
    assert report == json.loads((whole / "report.json").read_text(encoding="utf-8"))
    assert report["prompts"]["evaluated"] == N_PROMPTS
    assert report["diversity_left_out"] is None
    assert "<svg" in (whole / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in whole.iterdir()} == {
        "candidates.jsonl", "report.json", "report.html"
    }  # fmt: skip

    with ending(start(*command, out)) as process:
        path = out / "candidates.jsonl"
        while process.poll() is None:
            if path.exists() and path.read_bytes().count(b"\n") > 1:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.communicate(timeout=PATIENCE_S)
    n_kept = path.read_bytes().count(b"\n")
    assert 1 < n_kept < N_PROMPTS
    assert not (out / "report.json").exists()
    told = palette(*command, out, "--no-html")
    assert told.exit_code == 0, told.stderr
    assert "Realised minus asked" in told.stdout
    assert "without --keep-texts" in told.stdout
    assert not (out / "report.html").exists()
    assert_same(lines(out), lines(whole))

    # Another palette is compared on the same candidates: none is sampled again.
    before = (out / "candidates.jsonl").read_bytes()
    more = ["--palette", '{"targets": {"variety": {"gain": 0.2}}, "candidates": 2}']
    told = palette(*command, out, *more, "--no-html")
    assert told.exit_code == 0, told.stderr
    assert "Navigation efficiency" in told.stdout
    assert (out / "candidates.jsonl").read_bytes() == before


def test_ctrl_c_ends_in_one_line(command, tmp_path):
    with ending(start(*command, tmp_path / "out")) as process:
        path = tmp_path / "out" / "candidates.jsonl"
        while process.poll() is None:
            if path.exists() and path.read_bytes().count(b"\n") > 0:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.002)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert err == "palette: stopped; what was written is whole, run the same command to continue\n"


def test_infeasible_palette_is_told_before_anything_is_sampled(command, tmp_path):
    told = palette(*command, tmp_path / "out", *INFEASIBLE)
    assert told.exit_code == 3
    assert told.stderr.startswith("palette: palette 2: no choice among")
    assert told.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_calibration(command, tmp_path):
    at = command.index("--calibration")
    told = palette(*command[:at], *command[at + 2 :], tmp_path / "out")
    assert told.exit_code == 1
    assert "has no calibration" in told.stderr
    assert "palette calibrate" in told.stderr


def test_without_matplotlib(command, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = palette(*command, tmp_path / "out")
    assert told.exit_code == 2
    assert 'pip install "palette-server[evaluate]"' in told.stderr
    assert "--no-html" in told.stderr
    assert not (tmp_path / "out").exists()


def test_too_few_prompts(command, folder, tmp_path):
    same = tmp_path / "same.jsonl"
    same.write_text('"What can I cook?"\n' * 3)
    told = palette(command[0], same, *command[2:], tmp_path / "out")
    assert told.exit_code == 2
    assert "fewer than two different prompts" in told.stderr


@pytest.mark.parametrize("text", ["{", '{"target": {}}', "3"])
def test_bad_palette(folder, tmp_path, text):
    told = palette("evaluate", folder / "heldout.jsonl", "--palette", text)
    assert told.exit_code == 2
    assert told.stderr.startswith("palette: --palette")


def test_no_palette(folder):
    told = palette("evaluate", folder / "heldout.jsonl")
    assert told.exit_code == 2
    assert "--palette" in told.stderr
