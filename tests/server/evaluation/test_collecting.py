"""Candidates of held-out prompts: each sampled once, numbers only, whatever stops the run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from server.backends.base import BackendError, PromptError, SamplingSettings
from server.batch import OutputError
from tests.server.conftest import run_fake
from tests.server.evaluation.conftest import PROMPTS, N, collected_by
from tests.server.fakes import FakeBackend
from tests.server.questions import Breaks, prompts_of, records, stopped_after


def assert_same(first, second):
    for name in ("rewards", "watched", "tokens", "words", "cluster", "seeds"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


async def test_what_is_collected(aligner, tmp_path):
    out = tmp_path / "new" / "candidates.jsonl"
    calls = []
    found = await collected_by(aligner, out, progress=lambda *call: calls.append(call))
    assert calls == [(i, 12) for i in range(13)]
    assert found.rewards.shape == (12, N, 3)
    assert found.watched.shape == (12, N, 0)
    assert (found.n_refused, found.n_incomplete) == (0, 0)
    assert len(found.texts) == 12
    for p, texts in enumerate(found.texts):
        assert found.words[p].tolist() == [len(text.split()) for text in texts]
        assert found.rewards[p, :, 0].tolist() == found.words[p].tolist()
    assert (found.tokens == found.words + 1).all()  # the end token


async def test_file_holds_numbers_only(aligner, tmp_path):
    out = tmp_path / "candidates.jsonl"
    found = await collected_by(aligner, out)
    told = out.read_text()
    assert "Question" not in told
    texts = [text for texts in found.texts for text in texts if " " in text]
    assert len(texts) > 40
    assert not [text for text in texts if text in told]
    assert set(records(out)[0]) == {"index", "run", "rewards", "watched", "tokens", "words"}


async def test_texts_are_kept_where_they_are_wanted(aligner, tmp_path):
    out = tmp_path / "candidates.jsonl"
    found = await collected_by(aligner, out, keep_texts=True)
    assert [tuple(record["texts"]) for record in records(out)] == list(found.texts)
    assert (await collected_by(aligner, out)).texts == found.texts


async def test_texts_of_an_earlier_run_are_gone(aligner, tmp_path):
    out = tmp_path / "candidates.jsonl"
    assert (await collected_by(aligner, out, limit=5)).texts is not None
    assert (await collected_by(aligner, out)).texts is None


async def test_concurrency_does_not_show(aligner, tmp_path):
    first, *others = [
        await collected_by(aligner, tmp_path / f"{n}.jsonl", concurrency=n) for n in (1, 4, 30)
    ]
    for other in others:
        assert_same(first, other)


async def test_candidates_are_those_of_palette_generate(aligner, tmp_path):
    """The same seed and index give the same candidates, so a draw is what would be served."""
    from server.batch import generate_file
    from server.schemas import PaletteOptions

    found = await collected_by(aligner, tmp_path / "a.jsonl", seed=7)
    palette = PaletteOptions(targets={"words": {"at_most": 8.0}}, candidates=N, report="full")
    out = tmp_path / "b.jsonl"
    await generate_file(aligner, PROMPTS, out, palette=palette, sampling=SamplingSettings(), seed=7)
    for record in records(out):
        detail = record["palette"]["candidates_detail"]
        assert tuple(one["text"] for one in detail) == found.texts[record["index"]]


# stopped and continued


async def test_stopped_at_arbitrary_moments_and_continued(aligner, tmp_path):
    whole = await collected_by(aligner, tmp_path / "whole.jsonl")
    rng = np.random.default_rng(0)
    n_stops = 0
    for trial in range(8):
        out, have = tmp_path / f"{trial}.jsonl", 0
        while True:
            turns = int(rng.integers(1, 150))
            if await stopped_after(turns, collected_by(aligner, out, concurrency=1 + trial % 4)):
                break
            before, have = have, len(records(out)) if out.exists() else 0
            assert have >= before  # nothing is lost
            n_stops += 1
        assert_same(await collected_by(aligner, out), whole)
        assert len(records(out)) == len(PROMPTS)
    assert n_stops > 5


async def test_line_cut_in_half_is_written_anew(aligner, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    wanted = await collected_by(aligner, whole, concurrency=1)
    data = whole.read_bytes()
    for end in (len(data) - 1, len(data) - 40, data.rindex(b"\n", 0, len(data) - 1) + 3):
        out.write_bytes(data[:end])
        assert_same(await collected_by(aligner, out), wanted)


async def test_more_prompts_continue_the_file(aligner, tmp_path):
    out = tmp_path / "out.jsonl"
    await collected_by(aligner, out, limit=5)
    n_before = aligner.backend.n_started
    found = await collected_by(aligner, out)
    assert aligner.backend.n_started - n_before == 7
    assert_same(found, await collected_by(aligner, tmp_path / "whole.jsonl"))
    assert len((await collected_by(aligner, out, limit=3)).rewards) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"n_candidates": 5},
        {"seed": 1},
        {"sampling": SamplingSettings(temperature=0.5)},
        {"prompts": PROMPTS[::-1]},
        {"prompts": PROMPTS[:5]},
    ],
    ids=["candidates", "seed", "sampling", "order", "fewer"],
)
async def test_another_run_does_not_mix_in(aligner, tmp_path, change):
    out = tmp_path / "out.jsonl"
    await collected_by(aligner, out)
    before = out.read_bytes()
    with pytest.raises(OutputError, match="another"):
        await collected_by(aligner, out, **change)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line["tokens"].pop(),
        lambda line: line["rewards"].pop("words"),
        lambda line: line["rewards"].update(words=[1, 2, 3]),
        lambda line: line["rewards"].update(words=["a", 1, 2, 3]),
        lambda line: line["rewards"].update(words=[float("nan"), 1, 2, 3]),
        lambda line: line.pop("watched"),
    ],
)
async def test_damaged_line_is_told(aligner, tmp_path, change):
    out = tmp_path / "out.jsonl"
    await collected_by(aligner, out, limit=2)
    lines = records(out)
    change(lines[1])
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(OutputError, match="no output of `palette evaluate`"):
        await collected_by(aligner, out)


# prompts that cannot be answered, and failures


class Picky(FakeBackend):
    """Refuses one prompt, and gives another too few candidates."""

    async def render(self, messages, tools=None):
        if messages[0]["content"] == "Question 3":
            raise PromptError("the template says no")
        return await super().render(messages)

    async def generate(self, prompt, n_candidates, *arguments, **options):
        n = n_candidates - (prompt.messages[0]["content"] == "Question 5")
        async for candidate in super().generate(prompt, n, *arguments, **options):
            yield candidate


async def test_refused_and_incomplete_prompts_are_left_out(tmp_path, settings, caplog):
    async with run_fake(tmp_path, settings, Picky()) as running:
        out = tmp_path / "out.jsonl"
        for _ in range(2):
            found = await collected_by(running.context.aligner, out)
            assert found.rewards.shape == (10, N, 3)
            assert (found.n_refused, found.n_incomplete) == (1, 1)
    assert "1 of 12 prompts did not get all their candidates" in caplog.text
    assert len(records(out)) == 11
    assert records(out)[3]["error"] == "the template says no"


async def test_equal_prompts_are_one_cluster(aligner, tmp_path):
    prompts = prompts_of("a", "b", "a", "c", "b")
    found = await collected_by(aligner, tmp_path / "out.jsonl", prompts)
    assert found.cluster.tolist() == [0, 1, 0, 2, 1]
    assert len({texts for texts in found.texts}) == 5  # sampled anew each time


async def test_failure_ends_the_run_and_keeps_what_was_scored(tmp_path, settings):
    backend, out = Breaks(), tmp_path / "out.jsonl"
    async with run_fake(tmp_path, settings, backend) as running:
        aligner = running.context.aligner
        with pytest.raises(BackendError, match="broke"):
            await collected_by(aligner, out, concurrency=1)
        assert [record["index"] for record in records(out)] == list(range(6))
        backend.breaks = False
        assert len((await collected_by(aligner, out)).rewards) == 12


# watches


class Watched:
    """A suite with a column that watches `words`: another scorer's view, here the words squared."""

    watches = {"words": "words_too"}  # noqa: RUF012

    def __init__(self, suite):
        self.suite = suite
        self.names = suite.names
        self.fingerprint = "w" * 64

    async def score(self, samples, names=None):
        if names is not None and list(names) == ["words_too"]:
            return (await self.suite.score(samples, ["words"])) ** 2
        return await self.suite.score(samples, names)


async def test_watches_are_scored_beside_the_values(aligner, tmp_path):
    aligner.rewards = Watched(aligner.rewards)
    out = tmp_path / "out.jsonl"
    found = await collected_by(aligner, out)
    np.testing.assert_array_equal(found.watched[..., 0], found.words**2)
    assert_same(await collected_by(aligner, out), found)
    assert aligner.backend.n_started == 12
