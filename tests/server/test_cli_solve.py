"""``palette solve``: what it prints for programs and for people, and what it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tests.server.commands import BAD_USAGE, DONE, INFEASIBLE, one_line, palette, refused
from tests.server.conftest import fake_calibration

pytestmark = pytest.mark.usefixtures("_clean_environment")
FIELDS = {
    "status", "values", "targets", "multipliers", "expected", "stderr", "base", "ess", "kl",
    "candidates", "min_candidates", "certificate", "repaired", "kkt_residual", "solve_ms",
}  # fmt: skip


@pytest.fixture
def lines(tmp_path):
    """Return a JSONL pilot of 60 prompts x 12 answers and its rewards."""
    rewards = np.random.default_rng(0).normal(size=(60, 12, 2)) * [1, 5] + [0, 40]
    path = tmp_path / "pilot.jsonl"
    with path.open("w") as file:
        for i, prompt in enumerate(rewards):
            columns = {"kind": prompt[:, 0].tolist(), "words": prompt[:, 1].tolist()}
            file.write(json.dumps({"prompt": f"p{i}", "rewards": columns}) + "\n")
    return path


@pytest.fixture
def flat(tmp_path):
    rewards = np.random.default_rng(1).normal(size=(400, 2))
    path = tmp_path / "flat.json"
    path.write_text(json.dumps([{"kind": k, "funny": f, "text": "x"} for k, f in rewards.tolist()]))
    return path


def solve(pilot, targets, *options):
    return palette("solve", "--pilot", pilot, "--targets", json.dumps(targets), *options)


def solved(pilot, targets, *options):
    result = solve(pilot, targets, *options, "--json")
    assert result.exit_code == DONE, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_solve_jsonl(lines):
    found = solved(lines, {"kind": {"gain": 0.5}, "words": "keep"}, "--candidates", 8)
    assert set(found) >= FIELDS
    assert found["status"] == "optimal"
    assert found["values"] == ["kind", "words"]
    for name in ("multipliers", "expected", "stderr", "base"):
        assert set(found[name]) == {"kind", "words"}
    assert found["expected"]["kind"] == pytest.approx(found["targets"]["kind"], abs=1e-6)
    assert found["expected"]["words"] >= found["base"]["words"] - 1e-6
    assert found["candidates"] == 8
    assert 1 <= found["min_candidates"] <= 8
    assert found["certificate"] is None
    assert found["repaired"] is None
    assert found["kkt_residual"] <= 1e-8
    assert 1 < found["ess"] <= 8
    assert found["kl"] > 0
    assert found["solve_ms"] > 0
    assert not found["pooled"]


def test_solve_prints_one_json_object(lines):
    assert solve(lines, {"kind": "keep"}, "--candidates", 8, "--json").stdout.count("\n") == 1


def test_solve_for_people(lines):
    told = solve(lines, {"kind": {"gain": 0.5}}, "--candidates", 8)
    assert told.exit_code == DONE
    for word in ("kind", "words", "multiplier", "expected", "optimal", "ESS", "smallest N"):
        assert word in told.stdout


def test_solve_flat_list_is_pooled(flat):
    found = solved(flat, {"kind": {"at_least": 0.4}, "funny": "keep"})
    assert set(found) >= FIELDS
    assert found["pooled"] is True
    assert found["values"] == ["kind", "funny"]
    assert found["expected"]["kind"] == pytest.approx(0.4, abs=1e-6)


def test_solve_calibration(tmp_path):
    path = tmp_path / "calibration.npz"
    fake_calibration().save(path)
    found = solved(path, {"words": {"at_most": 8}})
    assert found["targets"] == {"words": 8.0}
    assert found["multipliers"]["words"] < 0
    assert found["candidates"] == 16


def test_solve_gives_the_logit(tmp_path):
    """Half of the answers have 1, half 0: to get 0.8 of them, N → ∞, takes log 4."""
    path = tmp_path / "coin.jsonl"
    path.write_text(json.dumps({"prompt": "p", "rewards": {"head": [0.0, 1.0] * 4}}) + "\n")
    found = solved(path, {"head": {"at_least": 0.8}}, "--candidates", "inf")
    assert found["multipliers"]["head"] == pytest.approx(math.log(4))
    assert found["candidates"] == "inf"


def test_solve_auto_takes_what_it_needs(lines):
    targets = {"kind": {"gain": 1.0}}
    found = solved(lines, targets, "--candidates", "auto")
    assert found["status"] == "optimal"
    assert found["min_candidates"] <= found["candidates"] <= 2 * found["min_candidates"]
    fewer = solve(lines, targets, "--candidates", found["min_candidates"] - 1)
    assert fewer.exit_code == INFEASIBLE


def test_solve_is_reproducible_and_seeds_differ(lines):
    options = ("--candidates", 4, "--groups", 100, "--seed")
    found = [solved(lines, {"kind": {"gain": 0.4}}, *options, seed) for seed in (1, 1, 2)]
    assert found[0]["multipliers"] == found[1]["multipliers"] != found[2]["multipliers"]


def test_solve_max_kl(lines):
    found = solved(lines, {"kind": {"gain": 1.0}}, "--candidates", 8, "--max-kl", 0.1)
    assert found["kl"] <= 0.1 + 1e-6
    assert found["limited_by"] == "max_kl"


def test_solve_infeasible(lines):
    told = solve(lines, {"kind": {"at_least": 9}}, "--candidates", 8, "--json")
    assert told.exit_code == INFEASIBLE
    found = json.loads(told.stdout)
    assert set(found) >= FIELDS
    assert found["status"] == "infeasible"
    assert found["certificate"]["asked"] > found["certificate"]["limit"]
    assert found["min_candidates"] is None


def test_solve_infeasible_for_people(lines):
    told = solve(lines, {"kind": {"at_least": 9}}, "--candidates", 8)
    assert told.exit_code == INFEASIBLE
    assert "infeasible" in told.stdout
    assert "no choice among 8 candidates" in told.stdout


@pytest.mark.parametrize("candidates", ["auto", "inf"])
def test_solve_infeasible_at_any_number(lines, candidates):
    told = solve(lines, {"kind": {"at_least": 9}}, "--candidates", candidates, "--json")
    assert told.exit_code == INFEASIBLE
    assert json.loads(told.stdout)["status"] == "infeasible"


@pytest.mark.parametrize("method", ["interpolate", "greedy", "nearest"])
def test_solve_repairs(lines, method):
    found = solved(
        lines, {"kind": {"at_least": 9}, "words": "keep"}, "--candidates", 8,
        "--on-infeasible", "repair", "--method", method,
    )  # fmt: skip
    assert found["status"] == "repaired"
    assert set(found) >= FIELDS
    assert found["repaired"]["method"] == method
    assert found["targets"]["kind"] < 9
    assert found["expected"]["kind"] == pytest.approx(found["targets"]["kind"], abs=1e-4)
    assert found["certificate"]


def test_solve_best_effort(lines):
    options = ("--candidates", 8, "--on-infeasible", "best_effort")
    found = solved(lines, {"kind": {"at_least": 9}}, *options)
    assert found["status"] == "best_effort"
    assert found["repaired"]["method"] == "nearest"


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ({"kidn": "keep"}, ["kidn", "kind, words"]),
        ({"kind": {"quantile": 2}}, ["targets.kind.quantile"]),
        ({"kind": 3}, ["targets.kind"]),
        ([], ["targets"]),
        (3, ["targets"]),
        (None, ["targets"]),
        ({"kind": {"at_least": float("nan")}}, ["targets.kind.at_least"]),
    ],
)
def test_solve_bad_targets(lines, targets, words):
    one_line(solve(lines, targets, "--candidates", 8), BAD_USAGE, *words)


@pytest.mark.parametrize("text", ["", "{", "kind=3", "{'kind': 'keep'}"])
def test_solve_targets_that_are_no_json(lines, text):
    told = palette("solve", "--pilot", lines, "--targets", text)
    one_line(told, BAD_USAGE, "--targets", "quote it for the shell")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "", "²", "13", "1e3", "99999999999999"])
def test_solve_bad_candidates(lines, text):
    told = solve(lines, {"kind": "keep"}, f"--candidates={text}")
    one_line(told, BAD_USAGE, "candidates")


@pytest.mark.parametrize(
    "options",
    [["--max-kl", "0"], ["--max-kl", "nan"], ["--groups", "0"], ["--seed", "-1"],
     ["--on-infeasible", "cry"], ["--method", "luck"]],
)  # fmt: skip
def test_solve_bad_options(lines, options):
    refused(solve(lines, {"kind": "keep"}, "--candidates", 8, *options), BAD_USAGE, options[0][2:5])


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"{\n", b"[]", b'{"prompt": "a"}\n', b"PK\x03\x04cut", b"\xff\xfe\x00",
     b'{"prompt": "a", "rewards": {"kind": [1, 2]}}\n{"prompt": "b", "rewards": {"kind": [1]}}\n'],
)  # fmt: skip
def test_solve_bad_pilot(tmp_path, content):
    path = tmp_path / "pilot"
    path.write_bytes(content)
    one_line(solve(path, {"kind": "keep"}), BAD_USAGE, str(path))


@pytest.mark.parametrize("name", ["none.jsonl", "."])
def test_solve_missing_pilot(tmp_path, name):
    one_line(solve(tmp_path / name, {"kind": "keep"}), BAD_USAGE, str(tmp_path / name))
