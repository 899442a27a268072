"""Which calibrations are there when a server starts: shipped, kept, named, old or damaged."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.calibration import NO_SYSTEM, CalibrationError, folder_of, load_calibration
from server.shelf import Shelf
from solver import PilotSet
from tests.server.calibrations_made import (
    PALETTE,
    SUPPORT,
    VALUES,
    found,
    hashed,
    keep,
    load,
    made,
)
from tests.server.conftest import run_fake

# what is put there at the start


def test_nothing_anywhere(tmp_path):
    shelf = load(tmp_path)
    assert shelf.held == ()
    assert shelf.default is None


def test_all_that_fit_are_there(tmp_path):
    kept = folder_of(tmp_path / "state")
    made(1).save(kept / "a.npz")
    made(2, temperature=0.5).save(kept / "b.npz")
    made(3, model_fingerprint="0" * 64).save(kept / "other-model.npz")
    made(4, rewards_fingerprint="0" * 64).save(kept / "other-rewards.npz")
    made(5).save(tmp_path / "shipped.npz")
    made(6).save(tmp_path / "named.npz")
    (kept / "a.npz.partial").write_text("{}")
    shelf = load(tmp_path, tmp_path / "named.npz")
    assert found(shelf) == {
        (made(1).id, "kept"), (made(2).id, "kept"), (made(5).id, "shipped"),
        (made(6).id, "named"),
    }  # fmt: skip
    assert shelf.default.id == made(6).id
    assert shelf.damaged == ()


def test_the_shipped_one_is_for_its_own_models_only(tmp_path):
    made().save(tmp_path / "shipped.npz")
    assert load(tmp_path, model_fingerprint="0" * 64).held == ()
    assert load(tmp_path, rewards_fingerprint="0" * 64).held == ()


def test_the_named_one_is_held_whatever_it_was_made_with(tmp_path):
    made().save(tmp_path / "named.npz")
    shelf = load(tmp_path, tmp_path / "named.npz", model_fingerprint="0" * 64)
    assert shelf.default.id == made().id


def test_the_named_one_may_be_one_that_is_kept(tmp_path):
    path = folder_of(tmp_path / "state") / "a.npz"
    made().save(path)
    assert found(load(tmp_path, path)) == {(made().id, "named")}


def test_named_one_that_is_not_there_is_not_replaced_by_another(tmp_path):
    made().save(folder_of(tmp_path / "state") / "a.npz")
    with pytest.raises(CalibrationError, match=r"named\.npz"):
        load(tmp_path, tmp_path / "named.npz")


@pytest.mark.parametrize("values", [("words",), ("variety", "words", "log_likelihood")])
def test_named_one_of_other_values_is_refused(tmp_path, values):
    path = tmp_path / "named.npz"
    made(values=values).save(path)
    with pytest.raises(CalibrationError) as caught:
        load(tmp_path, path)
    told = str(caught.value)
    assert str(path) in told
    assert "palette calibrate" in told
    assert ", ".join(values) in told
    assert ", ".join(VALUES) in told


async def test_damaged_files_are_told_and_the_others_served_with(tmp_path, settings, caplog):
    keep(settings, made(1))
    kept = folder_of(settings.state_dir)
    whole = (kept / "0.npz").read_bytes()
    shares = (0.0, 0.3, 0.9, 0.999)
    for share in shares:
        (kept / f"torn-{share}.npz").write_bytes(whole[: int(share * len(whole))])
    (kept / "zeros.npz").write_bytes(bytes(len(whole)))
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        report = (await running.chat(palette=PALETTE)).json()["palette"]
        listed = (await running.client.get("/v1/palette/calibrations")).json()
    assert report["calibration"]["id"] == made(1).id
    names = {*(f"torn-{share}.npz" for share in shares), "zeros.npz"}
    assert set(listed["damaged"]) == names
    assert all(name in caplog.text for name in names)


@pytest.mark.parametrize(
    "info",
    [{"systems": {}}, {"systems": {"none": 0}}, {"max_tokens": 0}],
)
def test_record_that_cannot_be_reckoned_with_is_damaged(tmp_path, info):
    """Such a one must not fail when a request comes."""
    path = folder_of(tmp_path / "state") / "a.npz"
    path.parent.mkdir(parents=True)
    record = made().info.model_copy(update=info).model_dump(mode="json")
    metadata = {"calibration": record}
    PilotSet(made().pilot.rewards, VALUES, metadata=metadata).save(path)
    shelf = load(tmp_path)
    assert shelf.held == ()
    assert [one.path for one in shelf.damaged] == [path]


# old files


def test_file_without_the_newer_fields_loads(tmp_path):
    one = made(1)
    newer = {"name", "revision", "chat_template", "systems", "prompts_hash", "n_given"}
    record = {"calibration": one.info.model_dump(mode="json", exclude=newer)}
    PilotSet(one.pilot.rewards, one.pilot.values, metadata=record).save(tmp_path / "old.npz")
    read = load_calibration(tmp_path / "old.npz")
    assert read.info == one.info.model_copy(update=dict.fromkeys(newer))
    assert read.id == one.id
    # Where system prompts were not written down, there were none.
    assert read.share_of(NO_SYSTEM) == 1
    assert read.share_of(hashed(SUPPORT)) == 0


def test_newer_fields_survive_the_file(tmp_path):
    one = made(
        name="support", revision="abc", chat_template="d" * 64, systems={NO_SYSTEM: 16},
        prompts_hash="e" * 64, n_given=17,
    )  # fmt: skip
    one.save(tmp_path / "one.npz")
    assert load_calibration(tmp_path / "one.npz").info == one.info


def test_the_only_one():
    shelf = Shelf.of(made())
    assert shelf.default.id == made().id
    other = replace(made(), info=made().info.model_copy(update={"temperature": 0.3}))
    assert Shelf.of(other).default is other
    assert Shelf.of(None).default is None
