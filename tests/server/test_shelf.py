"""Calibrations side by side: which one a request gets, and what it is told about that."""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from rewards import Message
from server.app import running_app
from server.backends.base import SamplingSettings
from server.calibration import (
    NO_SYSTEM,
    Calibration,
    CalibrationError,
    folder_of,
    load_calibration,
    system_of,
)
from server.shelf import Shelf, UnknownCalibrationError, load_shelf
from server.shelf_files import Held
from solver import PaletteError, PilotSet
from tests.server.conftest import fake_calibration, run_fake
from tests.server.fakes import FakeBackend, lexical_rewards

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


# the table: two calibrations, four temperatures, two system prompts


PLAIN = made(1, temperature=1.0)
WARM = made(2, temperature=0.7, systems={hashed(SUPPORT): 16})

TABLE = [
    # temperature, system prompt -> the one used, words of its warnings
    (1.0, None, PLAIN, []),
    (1.0, SUPPORT, WARM, ["temperature=1"]),
    (0.7, None, PLAIN, ["temperature=0.7"]),
    (0.7, SUPPORT, WARM, []),
    (0.5, None, PLAIN, ["temperature=0.5"]),
    (0.5, SUPPORT, WARM, ["temperature=0.5"]),
    (1.5, None, PLAIN, ["temperature=1.5"]),
    (1.5, SUPPORT, WARM, ["temperature=1.5"]),
    # A system prompt that none was made with: the nearest temperature, and both faults are told.
    (1.0, LEGAL, PLAIN, ["this system prompt"]),
    (0.7, LEGAL, WARM, ["this system prompt"]),
    (0.5, LEGAL, WARM, ["temperature=0.5", "this system prompt"]),
]


@pytest.mark.parametrize("order", [1, -1])
async def test_each_request_gets_the_right_one_or_is_told_that_none_fits(tmp_path, settings, order):
    keep(settings, *(PLAIN, WARM)[::order])
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        for temperature, system, wanted, warned in TABLE:
            answer = await running.chat(
                messages=asked(system), temperature=temperature, palette=PALETTE, seed=1
            )
            report = answer.json()["palette"]
            told = report["calibration"]
            where = (temperature, system)
            assert told["id"] == wanted.id, where
            assert told["valid"] == (not warned), where
            assert len(told["warnings"]) == len(warned), where
            for warning, words in zip(told["warnings"], warned, strict=True):
                assert words in warning, where
            # The promise is of that one, not only the label.
            level = wanted.pilot.base[0] + 0.2 * wanted.pilot.within_std[0]
            assert report["targets"]["words"] == pytest.approx(level), where


def test_four_calibrations_leave_nothing_uncovered():
    grid = list(itertools.product((1.0, 0.7), (None, SUPPORT)))
    ones = {
        point: made(seed, temperature=point[0], systems={hashed(point[1]): 16})
        for seed, point in enumerate(grid)
    }
    shelf = shelf_of(*ones.values())
    for point, one in ones.items():
        found = shelf.choose(SamplingSettings(temperature=point[0]), asked(point[1]))
        assert found is one
        assert found.distance(SamplingSettings(temperature=point[0]), hashed(point[1])) == 0


# distance


def test_distance_is_zero_exactly_where_nothing_is_warned_of():
    rng = random.Random(0)
    n_covered = 0
    for _ in range(2000):
        one = made(
            temperature=rng.choice([0.7, 1.0]), top_p=rng.choice([0.9, 1.0]),
            top_k=rng.choice([0, 1, 50]), max_tokens=rng.choice([16, 21, 512]),
            truncated_share=rng.choice([0.0, 0.05]),
            systems=rng.choice([None, {NO_SYSTEM: 16}, {hashed(SUPPORT): 9, NO_SYSTEM: 7}]),
        )  # fmt: skip
        sampling = SamplingSettings(
            temperature=rng.choice([0.7, 1.0]), top_p=rng.choice([0.9, 1.0]),
            top_k=rng.choice([0, 1, 50]), max_tokens=rng.choice([16, 20, 21, 512, 600]),
        )  # fmt: skip
        system = rng.choice([NO_SYSTEM, hashed(SUPPORT), hashed(LEGAL)])
        warnings = one.warnings_for(MODEL, one.info.rewards_fingerprint, sampling, system)
        distance = one.distance(sampling, system)
        assert (distance == 0) == (not warnings), (warnings, distance)
        n_covered += not warnings
    assert n_covered > 20


@pytest.mark.parametrize(
    ("nearer", "farther"),
    [
        ({"temperature": 0.9}, {"temperature": 0.7}),
        ({"top_p": 0.95}, {"top_p": 0.5}),
        ({"top_k": 50}, {"top_k": 2}),  # 50 of all tokens leave nearly what all of them do
        ({"temperature": 0.5}, {"systems": {hashed(LEGAL): 16}}),
        ({"max_tokens": 500, "truncated_share": 0.5}, {"max_tokens": 16, "truncated_share": 0.5}),
    ],
)
def test_nearest(nearer, farther):
    near, far = made(1, **nearer), made(2, **farther)
    for shelf in (shelf_of(near, far), shelf_of(far, near)):
        assert shelf.choose(SamplingSettings(), asked()) is near


def test_system_prompts_are_told_apart_by_their_texts():
    two = [Message(role="system", content=text) for text in ("a", "b")]
    one = [Message(role="system", content="ab")]
    assert system_of(()) == system_of(asked()) == NO_SYSTEM
    assert len({system_of(two), system_of(one), hashed(SUPPORT), NO_SYSTEM}) == 4
    assert system_of([*asked(SUPPORT), Message(role="user", content="And?")]) == hashed(SUPPORT)


@pytest.mark.parametrize(
    ("systems", "system", "told"),
    [
        ({NO_SYSTEM: 16}, SUPPORT, "made without one"),
        ({hashed(LEGAL): 16}, SUPPORT, "made with others"),
        ({hashed(LEGAL): 8, NO_SYSTEM: 8}, SUPPORT, "made with others"),
        ({hashed(LEGAL): 16}, None, "this conversation has none"),
        (None, SUPPORT, "before system prompts were recorded"),
        (None, None, None),
        ({hashed(LEGAL): 1, NO_SYSTEM: 15}, LEGAL, None),
    ],
)
def test_what_is_told_of_a_system_prompt(systems, system, told):
    one = made(systems=systems)
    warnings = one.warnings_for(
        MODEL, one.info.rewards_fingerprint, SamplingSettings(), hashed(system)
    )
    assert len(warnings) == (told is not None)
    assert all(told in warning for warning in warnings)


# among several that cover a request


def test_one_for_this_very_system_prompt_before_a_mixture_with_it():
    pure = made(1, systems={hashed(SUPPORT): 16}, created=DAY)
    mixed = made(2, systems={hashed(SUPPORT): 4, NO_SYSTEM: 12}, created=DAY + timedelta(1))
    shelf = Shelf([Held(mixed, None, "named"), Held(pure, None, "shipped")])
    assert shelf.choose(SamplingSettings(), asked(SUPPORT)) is pure
    assert shelf.choose(SamplingSettings(), asked()) is mixed


def test_named_before_kept_before_shipped_then_the_newest():
    ones = [made(seed, created=DAY + timedelta(seed)) for seed in range(4)]
    held = [
        Held(ones[3], None, "shipped"), Held(ones[1], None, "kept"), Held(ones[2], None, "kept"),
        Held(ones[0], None, "named"),
    ]  # fmt: skip
    for wanted in (ones[0], ones[2], ones[1], ones[3]):
        assert Shelf(held).choose(SamplingSettings(), asked()) is wanted
        held = [one for one in held if one.calibration is not wanted]


def test_what_the_operator_named_comes_before_the_nearest_but_not_before_what_covers():
    named, near, fits = made(1, temperature=0.2), made(2, temperature=0.9), made(3)
    shelf = Shelf([Held(near), Held(named, None, "named")])
    assert shelf.choose(SamplingSettings(), asked()) is named
    shelf = Shelf([Held(near), Held(named, None, "named"), Held(fits)])
    assert shelf.choose(SamplingSettings(), asked()) is fits


def test_of_another_model_covers_nothing():
    named, fits = made(1, model_fingerprint="0" * 64), made(2)
    held = [Held(named, None, "named"), Held(fits)]
    shelf = Shelf(held, model_fingerprint=MODEL)
    assert shelf.choose(SamplingSettings(), asked()) is fits


# by name


def test_by_name_and_by_id():
    ones = [made(1, name="support"), made(2, name="legal", temperature=0.7), made(3)]
    shelf = shelf_of(*ones)
    for one in ones:
        assert shelf.choose(SamplingSettings(), asked(), one.id) is one
    assert shelf.choose(SamplingSettings(), asked(), "legal") is ones[1]


def test_of_several_with_one_name_the_one_that_covers_the_request():
    ones = [made(seed, name="support", temperature=t) for seed, t in enumerate((1.0, 0.7))]
    shelf = shelf_of(*ones, made(3, temperature=0.5))
    for one in ones:
        sampling = SamplingSettings(temperature=one.info.temperature)
        assert shelf.choose(sampling, asked(), "support") is one
    assert shelf.choose(SamplingSettings(temperature=0.5), asked(), "support") is ones[1]


@pytest.mark.parametrize("name", ["", "suport", "SUPPORT", "supp"])
def test_unknown_name(name):
    one = made(name="support")
    with pytest.raises(UnknownCalibrationError, match=f"support .{one.id}"):
        shelf_of(one).choose(SamplingSettings(), asked(), name)
    with pytest.raises(UnknownCalibrationError, match="none yet"):
        Shelf().choose(SamplingSettings(), asked(), name)


async def test_request_names_one(tmp_path, settings):
    named = made(2, name="support", temperature=0.7)
    keep(settings, made(1), named)
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        told = (await running.chat(palette=PALETTE | {"calibration": "support"})).json()
        assert told["palette"]["calibration"]["id"] == named.id
        assert not told["palette"]["calibration"]["valid"]
        solved = await running.client.post(
            "/v1/palette/solve", json={"palette": PALETTE | {"calibration": "support"}}
        )
        assert solved.json()["calibration"] == named.id
        curve = {
            "values": ["words", "variety"],
            "palette": {"calibration": "support", "candidates": 4},
        }
        traced = await running.client.post("/v1/palette/frontier", json=curve)
        assert traced.json()["calibration"] == named.id
        for scope in ("traffic", "answer"):
            wrong = await running.chat(palette=PALETTE | {"calibration": "x", "scope": scope})
            error = wrong.json()["error"]
            assert (wrong.status_code, error["code"]) == (400, "unknown_calibration")
            assert error["param"] == "palette.calibration"
            assert named.id in error["message"]
        assert running.backend.n_started == 1


async def test_default_palette_that_names_an_unknown_one_stops_the_start(tmp_path, settings):
    keep(settings, made(1, name="support"))
    for name in ("support", "legal"):
        ours = settings.model_copy(update={"default_palette": PALETTE | {"calibration": name}})
        starting = running_app(ours, backend=FakeBackend(), rewards=lexical_rewards(tmp_path))
        if name == "support":
            async with starting:
                continue
        with pytest.raises(PaletteError, match="no calibration 'legal'"):
            async with starting:
                pass


# changes while it serves


def test_replace_is_seen_whole():
    old, other, newer = made(1), made(2, temperature=0.5), made(3)
    shelf = shelf_of(old, other)
    shelf.replace(old.id, newer)
    assert [one.calibration for one in shelf.held] == [newer, other]
    with pytest.raises(UnknownCalibrationError):
        shelf.replace(old.id, newer)


def test_readers_always_see_one_version():
    versions = [made(seed) for seed in range(6)]
    shelf = shelf_of(versions[0], made(9, temperature=0.2))
    ids, wrong, is_done = {one.id for one in versions}, [], threading.Event()

    def read():
        while not is_done.is_set():
            found = shelf.choose(SamplingSettings(), asked())
            if found.id not in ids or len(shelf.held) != 2:
                wrong.append(found.id)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(300):
        for old, new in itertools.pairwise([*versions, versions[0]]):
            shelf.replace(old.id, new)
    is_done.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert shelf.default is versions[0]


def test_writers_lose_no_change_of_each_other():
    shelf = Shelf()
    ones = [made(seed) for seed in range(60)]
    writers = [
        threading.Thread(target=lambda part=part: [shelf.add(one) for one in part])
        for part in (ones[:20], ones[20:40], ones[40:])
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {one.calibration.id for one in shelf.held} == {one.id for one in ones}


def test_added_from_the_same_file_takes_its_place(tmp_path):
    shelf = Shelf()
    for seed, name in ((1, "a"), (2, "b"), (3, "a")):
        shelf.add(made(seed), tmp_path / name)
    assert [one.calibration.id for one in shelf.held] == [made(2).id, made(3).id]


# what is put there at the start


def load(tmp_path, named=None, **changes):
    options = {
        "values": VALUES,
        "model_fingerprint": MODEL,
        "rewards_fingerprint": fake_calibration().info.rewards_fingerprint,
        "sampling": SamplingSettings(),
    }
    return load_shelf(named, tmp_path / "state", tmp_path / "shipped.npz", **options | changes)


def found(shelf):
    return {(one.calibration.id, one.source) for one in shelf.held}


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


# told to clients


async def test_route_lists_them(tmp_path, settings):
    keep(settings, made(1), made(2, name="support", systems={hashed(SUPPORT): 16}))
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        listed = (await running.client.get("/v1/palette/calibrations")).json()
    assert [one["id"] for one in listed["calibrations"]] == [made(1).id, made(2).id]
    assert [one["default"] for one in listed["calibrations"]] == [True, False]
    second = listed["calibrations"][1]
    assert second["name"] == "support"
    assert second["systems"] == {hashed(SUPPORT): 16}
    assert (second["prompts"], second["candidates"], second["source"]) == (16, 8, "kept")
    assert str(tmp_path) not in str(listed)


async def test_route_without_any(tmp_path, settings):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        listed = (await running.client.get("/v1/palette/calibrations")).json()
    assert listed == {"calibrations": [], "damaged": []}


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
