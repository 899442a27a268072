"""A calibration that is stopped, in whatever way, goes on where it was and ends the same."""

from __future__ import annotations

import asyncio
import json
import os
import random

import numpy as np
import pytest

from rewards import Message
from server.backends.base import BackendError, SamplingSettings
from server.calibrating import make_calibration, run_header
from server.calibration import CalibrationError, folder_of, load_calibration
from server.journal import open_journal, partial_path
from tests.server.calibrating_process import N_PROMPTS, make, nursery
from tests.server.conftest import run_fake
from tests.server.fakes import FakeBackend
from tests.server.questions import questions, started
from tests.server.waiting import until

PROMPTS = questions(20)
PALETTE = {"targets": {"words": {"gain": 0.2}}, "candidates": 4}
# `KILLS=200 pytest ...` for a long run.
KILLS = int(os.environ.get("KILLS", "10"))


async def run(backend, rewards, folder, prompts=PROMPTS, **options):
    options = {"n_candidates": 6, "sampling": SamplingSettings(), "prompts_source": "t"} | options
    return await make_calibration(backend, rewards, prompts, state_dir=folder, **options)


class Fails(FakeBackend):
    """Breaks at its n-th prompt."""

    def __init__(self, at, **options):
        super().__init__(**options)
        self._left = at

    async def generate(self, prompt, *arguments, **options):
        self._left -= 1
        if self._left < 0:
            raise BackendError("broke")
        async for candidate in super().generate(prompt, *arguments, **options):
            yield candidate


def same(one, other):
    assert one.pilot.rewards.tobytes() == other.pilot.rewards.tobytes()
    assert one.info.model_copy(update={"created": None}) == other.info.model_copy(
        update={"created": None}
    )


async def whole(tmp_path, **options):
    async with started(tmp_path) as (backend, rewards):
        return (await run(backend, rewards, tmp_path / "whole", **options))[0]


async def stopped(tmp_path, at=7, **options):
    """Stop a run at its n-th prompt; return the journal it left."""
    async with started(tmp_path, Fails(at)) as (backend, rewards):
        with pytest.raises(BackendError):
            await run(backend, rewards, tmp_path / "state", concurrency=1, **options)
    (left,) = (path for path in tmp_path.rglob("*.partial"))
    return left


# stopped and continued


@pytest.mark.parametrize("concurrency", [1, 3, 20])
async def test_continued_is_as_if_it_was_never_stopped(tmp_path, concurrency):
    for at in (0, 1, 4, 6):
        async with started(tmp_path, Fails(at)) as (backend, rewards):
            with pytest.raises(BackendError):
                await run(backend, rewards, tmp_path / "state", concurrency=concurrency)
    async with started(tmp_path) as (backend, rewards):
        calls = []
        made, path = await run(
            backend, rewards, tmp_path / "state", concurrency=concurrency,
            progress=lambda done, total: calls.append((done, total)),
        )  # fmt: skip
    same(made, await whole(tmp_path))
    assert load_calibration(path).id == made.id
    assert os.listdir(path.parent) == [path.name]
    # What was done was not done again, and the first report says how much that is.
    n_before = 20 - backend.n_started
    assert calls[0] == ((n_before or 1), 20)
    assert calls[-1] == (20, 20)
    if concurrency == 1:
        assert backend.n_started < 20


async def test_only_prompts_in_flight_are_lost(tmp_path):
    backend = FakeBackend(hold=True)
    backend.permits = asyncio.Semaphore(0)
    async with started(tmp_path, backend) as (_, rewards):
        backend.released.set()
        working = asyncio.create_task(run(backend, rewards, tmp_path / "state", concurrency=4))
        for _ in range(9 * 6):
            backend.permits.release()
        await until(lambda: backend.n_started - backend.n_cancelled >= 4)
        await until(lambda: backend.permits.locked())
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
    (left,) = tmp_path.rglob("*.partial")
    n_kept = left.read_bytes().count(b"\n") - 1
    # Nine prompts' worth of candidates came; the four in flight had no more than four's.
    assert 9 - 4 <= n_kept <= 9
    async with started(tmp_path) as (again, rewards):
        await run(again, rewards, tmp_path / "state")
    assert again.n_started == 20 - n_kept


async def test_prompts_that_do_not_fit_are_left_out_of_a_continued_one_too(tmp_path):
    prompts = [*PROMPTS[:5], (Message(role="user", content="word " * 600),), *PROMPTS[5:]]
    await stopped(tmp_path, 9, prompts=prompts)
    async with started(tmp_path) as (backend, rewards):
        made, _ = await run(backend, rewards, tmp_path / "state", prompts)
    assert made.pilot.n_prompts == 20
    assert made.info.n_given == 21
    same(made, await whole(tmp_path, prompts=prompts))


async def test_journal_holds_numbers_only(tmp_path):
    left = await stopped(tmp_path)
    assert "Question" not in left.read_text()
    header, *records = map(json.loads, left.read_text().splitlines())
    assert len(records) == 7
    assert header["prompts"] == 20
    assert set(records[0]) == {"index", "rewards", "longest", "cut"}


# other runs


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"n_candidates": 7}, {"sampling": SamplingSettings(temperature=0.5)},
        {"sampling": SamplingSettings(max_tokens=9)}, {"prompts": PROMPTS[:19]},
        {"prompts": PROMPTS[::-1]},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
async def test_another_run_does_not_mix_in(tmp_path, change):
    left = await stopped(tmp_path)
    before = left.read_bytes()
    async with started(tmp_path) as (backend, rewards):
        made, path = await run(backend, rewards, tmp_path / "state", **change)
        # In a file that the operator names, there is no other name to take.
        out = tmp_path / "mine.npz"
        partial_path(out).write_bytes(before)
        with pytest.raises(CalibrationError, match="unfinished calibration with other"):
            await run(backend, rewards, tmp_path / "state", out=out, **change)
    assert backend.n_started == made.pilot.n_prompts
    assert partial_path(path) != left
    assert left.read_bytes() == partial_path(out).read_bytes() == before


async def test_another_model_or_rewards_do_not_mix_in(tmp_path):
    left = await stopped(tmp_path, out=tmp_path / "mine.npz")
    for change in ("model", "context"):
        async with started(tmp_path) as (backend, rewards):
            if change == "model":
                backend.fingerprint = "e" * 64
            else:
                backend.max_context = 100
            with pytest.raises(CalibrationError, match="--out"):
                await run(backend, rewards, tmp_path, out=tmp_path / "mine.npz")
    assert left.exists()


@pytest.mark.parametrize("text", ["hello\n", '{"a": 1}\n', "[1]\n", "half", "\n"])
async def test_foreign_file_is_left_as_it_is(tmp_path, text):
    partial_path(tmp_path / "mine.npz").write_text(text)
    async with started(tmp_path) as (backend, rewards):
        with pytest.raises(CalibrationError, match="no unfinished calibration"):
            await run(backend, rewards, tmp_path, out=tmp_path / "mine.npz")
    assert partial_path(tmp_path / "mine.npz").read_text() == text


async def test_two_at_once_do_not_mix(tmp_path):
    backend = FakeBackend(hold=True)
    async with started(tmp_path, backend) as (_, rewards):
        first = asyncio.create_task(run(backend, rewards, tmp_path / "state"))
        await until(lambda: backend.n_started > 0)
        with pytest.raises(CalibrationError, match="another process"):
            async with asyncio.timeout(20):
                await run(backend, rewards, tmp_path / "state")
        backend.released.set()
        made, _ = await first
    same(made, await whole(tmp_path))


# damaged journals


async def test_journal_cut_anywhere_is_continued(tmp_path):
    left = await stopped(tmp_path)
    written = left.read_bytes()
    async with started(tmp_path) as (backend, rewards):
        header = run_header(
            backend, rewards, PROMPTS, n_candidates=6, sampling=SamplingSettings(), seed=0
        )
    lines = written.splitlines(keepends=True)
    ends = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
    cuts = {*range(0, len(written), 53), *ends, *(end - 1 for end in ends[1:])}
    for cut in sorted(cuts):
        # After the first line a power cut may also leave zeros, and then what came later.
        tails = (b"", bytes(50), b"\0\0\n" + lines[-1]) if cut >= ends[1] else (b"",)
        for tail in tails:
            left.write_bytes(written[:cut] + tail)
            journal = open_journal(left, header)
            journal.close()
            n_whole = max(1, written[:cut].count(b"\n"))
            assert len(journal.done) == n_whole - 1
            assert left.read_bytes() == b"".join(lines[:n_whole])
    left.write_bytes(bytes(300))
    open_journal(left, header).close()
    assert left.read_bytes() == lines[0]


async def test_continued_after_a_cut_is_the_same(tmp_path):
    left = await stopped(tmp_path)
    written = left.read_bytes()
    for cut in (3, len(written) // 2, len(written) - 5):
        left.write_bytes(written[:cut])
        async with started(tmp_path) as (backend, rewards):
            made, path = await run(backend, rewards, tmp_path / "state")
        same(made, await whole(tmp_path))
        path.unlink()


@pytest.mark.parametrize(
    "line",
    [
        "{}", "[]", "null", '"a"', '{"index": 0, "rewards": [[1, 2, 3]], "longest": 1, "cut": 0}',
        '{"index": 99, "rewards": REWARDS, "longest": 1, "cut": 0}',
        '{"index": true, "rewards": REWARDS, "longest": 1, "cut": 0}',
        '{"index": 0, "rewards": REWARDS, "longest": -1, "cut": 0}',
        '{"index": 0, "rewards": REWARDS, "longest": 1}',
        '{"index": 0, "rewards": REWARDS, "longest": 1, "cut": 0'.replace("REWARDS", "[[1e999]]"),
    ],
)  # fmt: skip
async def test_damaged_line_and_what_follows_is_made_again(tmp_path, line, caplog):
    left = await stopped(tmp_path)
    lines = left.read_text().splitlines(keepends=True)
    rewards = json.dumps(json.loads(lines[1])["rewards"])
    left.write_text("".join([*lines[:3], line.replace("REWARDS", rewards) + "\n", *lines[4:]]))
    async with started(tmp_path) as (backend, suite):
        made, _ = await run(backend, suite, tmp_path / "state")
    assert backend.n_started == 18
    assert "damaged at byte" in caplog.text
    same(made, await whole(tmp_path))


async def test_left_overs_of_a_save_are_swept_away(tmp_path):
    left = await stopped(tmp_path)
    name = left.name.removesuffix(".partial")
    (left.parent / f".{name}.abc.tmp").write_text("half")
    (left.parent / ".other.npz.abc.tmp").write_text("half")
    async with started(tmp_path) as (backend, rewards):
        await run(backend, rewards, tmp_path / "state")
    assert sorted(os.listdir(left.parent)) == [".other.npz.abc.tmp", name]


# killed


async def serves(tmp_path, settings, wanted):
    """Check that a server that starts now serves with this calibration, or knows it has none."""
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        body = (await running.chat(palette=PALETTE, seed=1)).json()
        if wanted is None:
            assert body["error"]["code"] == "calibration_missing"
        else:
            told = body["palette"]["calibration"]
            assert (told["id"], told["valid"]) == (wanted.id, True)
        assert running.context.aligner.shelf.damaged == ()


def n_done(state_dir):
    return sum(path.read_bytes().count(b"\n") for path in state_dir.rglob("*.partial"))


async def test_killed_at_any_moment(tmp_path, settings):
    """Each version is killed until it is done; every start after a kill has the last whole one."""
    rng = random.Random(5)
    versions, n_kills, n_late, seed = [], 0, 0, 0
    with nursery() as children:
        while n_kills < KILLS:
            reference = await make(tmp_path / f"reference{seed}", seed)
            before = 0
            while True:
                kill = {"killed_after": rng.randrange(14), "then_s": rng.uniform(0, 0.01)}
                code = children.calibrate_in_child(settings.state_dir, seed, **kill)
                n_kills += 1
                if code == 0:
                    n_late += 1
                    break
                assert code == -9
                kept = ids(settings)
                assert kept - {reference.id} == {one.id for one in versions}
                if reference.id in kept:
                    break  # killed when it was saved already
                await serves(tmp_path, settings, versions[-1] if versions else None)
                done = n_done(settings.state_dir)
                assert done >= before + kill["killed_after"]
                before = done
            await serves(tmp_path, settings, reference)
            for one in load_all(settings):
                if one.id == reference.id:
                    same(one, reference)
            versions.append(reference)
            seed += 1
    assert n_kills - n_late > KILLS / 2


def load_all(settings):
    return [load_calibration(path) for path in folder_of(settings.state_dir).glob("*.npz")]


def ids(settings):
    return {one.id for one in load_all(settings)}


async def test_killed_at_each_step_that_makes_it_durable(tmp_path, settings):
    """Before the first fsync, before the second, ... until it is not killed any more."""
    first = await make(settings.state_dir, 0)
    reference = await make(tmp_path / "reference", 1)
    most = 0
    with nursery() as children:
        for step in range(100):
            code = children.calibrate_in_child(settings.state_dir, 1, die_at=step)
            kept = ids(settings)
            assert {first.id} <= kept <= {first.id, reference.id}
            await serves(tmp_path, settings, reference if reference.id in kept else first)
            if code == 0:
                break
            assert code == -9
            # What was done is in the journal until it is in the calibration.
            done = n_done(settings.state_dir)
            assert done >= most or reference.id in kept
            most = done
            for path in folder_of(settings.state_dir).glob("*.npz"):
                if load_calibration(path).id == reference.id:
                    path.unlink()  # so that the next run ends in a save again
        else:
            raise AssertionError("it never ended")
    assert step >= 5
    assert ids(settings) == {first.id, reference.id}
    assert not list(settings.state_dir.rglob("*.partial"))
    assert n_done(settings.state_dir) == 0


def test_saved_means_on_the_disk(tmp_path, monkeypatch):
    """Content, then name, then the names of new folders: what a power cut leaves is whole."""
    calls = []
    fsync, rename = os.fsync, os.replace

    def note_fsync(handle):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def note_replace(source, target):
        calls.append(("replace", str(target)))
        rename(source, target)

    made = asyncio.run(make(tmp_path / "reference", 0))
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    path = tmp_path / "new" / "folder" / "one.npz"
    made.save(path)
    folders = [name for call, name in calls[:2] if call == "fsync"]
    assert set(folders) == {str(tmp_path), str(tmp_path / "new")}
    assert calls[2][0] == "fsync"
    assert ".one.npz." in calls[2][1]
    assert calls[3:] == [("replace", str(path)), ("fsync", str(path.parent))]


def test_reference_is_what_it_says(tmp_path):
    made = asyncio.run(make(tmp_path, 0))
    assert made.pilot.n_prompts == N_PROMPTS
    assert np.isfinite(made.pilot.rewards).all()
