"""``palette calibrations``: nothing is lost by a mistake, and what is damaged is told."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from server import embedded
from server.calibration import Calibration, folder_of, load_calibration
from server.journal import FORMAT
from solver import PilotSet
from tests.server.commands import BAD_USAGE, DONE, FAILED, palette
from tests.server.conftest import fake_calibration
from tests.server.fakes import LEXICAL_REWARDS


def made(seed=0, n_prompts=16, n_candidates=4, **info):
    rewards = np.random.default_rng(seed).normal(size=(n_prompts, n_candidates, 3))
    info = {"systems": {"none": n_prompts}, "n_given": n_prompts} | info
    record = fake_calibration().info.model_copy(update=info)
    return Calibration(PilotSet(rewards, ("words", "variety", "log_likelihood")), record)


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path, _clean_environment):
    """Return the folder of kept calibrations, with two in it; nothing ships."""
    monkeypatch.setattr(embedded, "CALIBRATION", tmp_path / "nothing.npz")
    folder = folder_of(tmp_path / "state")
    made(1).save(folder / "one.npz")
    made(2, name="support", temperature=0.7).save(folder / "two.npz")
    return folder


def calibrations(*arguments, stdin=None):
    return palette("calibrations", *arguments, stdin=stdin)


def listed():
    told = calibrations("list", "--json")
    assert told.exit_code == DONE
    return json.loads(told.stdout)


def failed(result, code, *words):
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr
    assert result.stderr.startswith("palette: ")


def damage(kept):
    whole = (kept / "one.npz").read_bytes()
    (kept / "torn.npz").write_bytes(whole[: len(whole) // 2])


def content(kept):
    return {path.name: path.read_bytes() for path in kept.iterdir()}


# help


def test_help():
    told = calibrations("--help")
    for name in ("list", "show", "verify", "delete", "export", "import"):
        assert f" {name} " in told.stdout
        each = calibrations(name, "--help").stdout
        assert f"palette calibrations {name}" in each.split("Example")[1]


# list and show


def test_list(kept):
    damage(kept)
    header = {"format": FORMAT, "prompts": 40}
    (kept / "three.npz.partial").write_text(json.dumps(header) + '\n{"index": 0}\n{"ind')
    (kept / "other.partial").write_text("no journal")
    found = listed()
    assert [(one["id"], one["name"]) for one in found["calibrations"]] == [
        (made(1).id, None),
        (made(2).id, "support"),
    ]
    (torn,) = found["damaged"]
    assert torn["file"] == str(kept / "torn.npz")
    assert "damaged" in torn["reason"]
    assert found["unfinished"] == [
        {"file": str(kept / "three.npz.partial"), "done": 1, "prompts": 40}
    ]
    table = calibrations("list")
    assert table.exit_code == DONE
    for word in (made(1).id, "support", "16 x 4", "T 0.7", "512 tokens"):
        assert word in table.stdout
    assert "torn.npz" in table.stderr
    assert "1 of 40 prompts" in table.stderr


@pytest.mark.parametrize(
    ("systems", "told"),
    [
        (None, "not recorded"),
        ({"none": 16}, "none"),
        ({"a" * 16: 16}, "a" * 16),
        ({"a" * 16: 8, "b" * 16: 8}, "2 different"),
        ({"none": 10, "a" * 16: 3, "b" * 16: 3}, "none and 2 different"),
        ({"none": 10, "a" * 16: 6}, "none and 1 different"),
    ],
)
def test_list_says_which_system_prompts(kept, systems, told):
    (kept / "two.npz").unlink()
    made(1, systems=systems).save(kept / "one.npz")
    assert f" {told} " in calibrations("list").stdout


def test_list_of_nothing(kept):
    for path in kept.iterdir():
        path.unlink()
    kept.rmdir()
    assert listed() == {"calibrations": [], "damaged": [], "unfinished": []}


def test_shipped_one_is_listed_and_stays(kept, tmp_path):
    made(3).save(embedded.CALIBRATION)
    assert listed()["calibrations"][-1]["source"] == "shipped"
    failed(calibrations("delete", made(3).id, "--yes"), FAILED, "ships with Palette")
    assert embedded.CALIBRATION.exists()


@pytest.mark.parametrize("reference", ["id", "id begins", "name", "file", "path"])
def test_show(kept, reference):
    one = made(2)
    given = {
        "id": one.id, "id begins": one.id[:4], "name": "support", "file": "two.npz",
        "path": kept / "two.npz",
    }[reference]  # fmt: skip
    record = json.loads(calibrations("show", given, "--json").stdout)
    assert record["id"] == one.id
    assert record["temperature"] == 0.7
    assert record["base"]["words"] == pytest.approx(one.pilot.base[0])
    told = calibrations("show", given)
    assert f"id: {one.id}" in told.stdout
    assert 'systems: {"none": 16}' in told.stdout


def test_reference_that_means_none_or_several(kept):
    failed(calibrations("show", "nothing"), BAD_USAGE, "nothing", made(1).id, made(2).id)
    failed(calibrations("show", made(1).id[:3]), BAD_USAGE)
    made(3, name="support").save(kept / "three.npz")
    failed(calibrations("show", "support"), BAD_USAGE, "more than one", made(2).id, made(3).id)
    damage(kept)
    failed(calibrations("show", "torn.npz"), BAD_USAGE, "torn.npz", "damaged")


# verify


def test_verify():
    told = calibrations("verify", "--json")
    assert told.exit_code == DONE
    assert [one["problems"] for one in json.loads(told.stdout)] == [[], []]
    assert calibrations("verify").stdout.count("; whole") == 2


def test_verify_tells_what_is_damaged(kept):
    damage(kept)
    told = calibrations("verify", "--json")
    assert told.exit_code == FAILED
    assert [bool(one["problems"]) for one in json.loads(told.stdout)] == [False, False, True]
    assert calibrations("verify", "support").exit_code == DONE


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (made(3, n_prompts=15), "too few"),
        (made(3, n_candidates=1), "one answer"),
        (made(3, systems={"none": 12}), "counts 12 prompts"),
        (made(3, n_given=12), "of 12 given"),
    ],
)
def test_verify_finds_what_cannot_be(kept, one, told):
    one.save(kept / "three.npz")
    result = calibrations("verify", one.id, "--json")
    assert result.exit_code == FAILED
    (checked,) = json.loads(result.stdout)
    assert len(checked["problems"]) == 1
    assert told in checked["problems"][0]


def test_verify_tells_how_many_prompts_were_left_out(kept):
    made(3, n_given=20).save(kept / "three.npz")
    result = calibrations("verify", "three.npz")
    assert result.exit_code == DONE
    assert "4 of the prompts given were left out" in result.stdout


def test_verify_fit_of_what_is_in_use(kept, tmp_path):
    """The chat model is not loaded: its folder alone has the answer."""
    rewards = tmp_path / "rewards.yaml"
    rewards.write_text(LEXICAL_REWARDS)
    model = tmp_path / "model"
    model.mkdir()
    for path in embedded.CHAT_MODEL.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    options = ("--in-use", "--model", model, "--rewards", rewards, "--json")
    told = calibrations("verify", *options)
    assert told.exit_code == FAILED  # none was made with this model
    assert [(one["fits_model"], one["fits_rewards"]) for one in json.loads(told.stdout)] == [
        (False, True),
        (False, True),
    ]
    from server.backends.hf_loading import fingerprint_of

    ours = fingerprint_of(str(model), model, None)
    made(3, model_fingerprint=ours).save(kept / "three.npz")
    told = calibrations("verify", *options)
    assert told.exit_code == DONE
    assert [one["fits_model"] for one in json.loads(told.stdout)] == [False, True, False]
    assert "NOT made with the model in use" in calibrations("verify", *options[:-1]).stdout
    (model / "config.json").unlink()
    failed(calibrations("verify", *options), FAILED, "config.json")


# delete


def test_delete(kept):
    (kept / "two.npz.partial").write_text("")
    told = calibrations("delete", "support", "--yes")
    assert told.exit_code == DONE
    assert os.listdir(kept) == ["one.npz"]
    failed(calibrations("delete", "support", "--yes"), BAD_USAGE, "support")


@pytest.mark.parametrize(("answer", "code", "n_left"), [("y\n", DONE, 1), ("n\n", FAILED, 2)])
def test_delete_asks(kept, answer, code, n_left):
    told = calibrations("delete", "support", stdin=answer)
    assert told.exit_code == code
    assert str(kept / "two.npz") in told.stderr
    assert len(os.listdir(kept)) == n_left


def test_delete_without_an_answer_deletes_nothing(kept):
    assert calibrations("delete", "support", stdin="").exit_code != DONE
    assert len(os.listdir(kept)) == 2


# export and import


def test_there_and_back(kept, tmp_path):
    told = calibrations("export", "support", tmp_path / "out" / "mine.npz")
    assert told.exit_code == DONE
    before = content(kept)
    again = calibrations("import", tmp_path / "out" / "mine.npz")
    assert again.exit_code == DONE
    assert "is there already" in again.stderr
    assert content(kept) == before
    (kept / "two.npz").unlink()
    assert calibrations("import", tmp_path / "out" / "mine.npz").exit_code == DONE
    back = next(one for one in listed()["calibrations"] if one["name"] == "support")
    assert load_calibration(tmp_path / "out" / "mine.npz").info.name == "support"
    assert (
        load_calibration(kept / os.path.basename(back["file"])).info
        == made(2, name="support", temperature=0.7).info
    )


def test_export_overwrites_nothing(kept, tmp_path):
    target = tmp_path / "mine.npz"
    target.write_text("precious")
    failed(calibrations("export", "support", target), FAILED, "exists")
    assert target.read_text() == "precious"
    assert calibrations("export", "support", tmp_path).exit_code == DONE
    assert load_calibration(tmp_path / "support.npz").id == made(2).id
    failed(calibrations("export", "support", tmp_path), FAILED, "exists")
    assert calibrations("export", made(1).id, tmp_path).exit_code == DONE
    assert (tmp_path / f"{made(1).id}.npz").exists()


def test_import_overwrites_nothing(kept, tmp_path):
    """Of the same model with the same rewards, and under the same name: still another one."""
    for seed in (3, 4, 5):
        made(seed, name="support").save(tmp_path / "mine.npz")
        assert calibrations("import", tmp_path / "mine.npz").exit_code == DONE
    assert len(listed()["calibrations"]) == 5


@pytest.mark.parametrize("problem", ["missing", "torn", "foreign", "few"])
def test_import_checks_first(kept, tmp_path, problem):
    path = tmp_path / "mine.npz"
    made(3, n_prompts=3 if problem == "few" else 16).save(path)
    if problem == "missing":
        path.unlink()
    elif problem == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    elif problem == "foreign":
        path.write_text("hello")
    before = content(kept)
    failed(calibrations("import", path), FAILED, "mine.npz")
    assert content(kept) == before
