"""A file of prompts: each answered once, the same whether or not the run was stopped."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from server.backends.base import BackendError, PromptError, SamplingSettings
from server.batch import OutputError, answered, generate_file
from server.promise import InfeasiblePaletteError
from server.schemas import PaletteOptions
from solver import UnknownValueError
from tests.server.conftest import run_fake
from tests.server.fakes import FakeBackend
from tests.server.questions import Breaks, prompts_of, questions, records, stopped_after
from tests.server.waiting import until

SHORT = PaletteOptions(targets={"words": {"at_most": 8.0}}, candidates=4)


PROMPTS = questions(12)


async def run(aligner, out, prompts=PROMPTS, **options):
    options = {"palette": SHORT, "sampling": SamplingSettings(), "concurrency": 3} | options
    return await generate_file(aligner, prompts, out, **options)


def answers(path):
    """Return what must not depend on interruptions: everything but times."""
    found = records(path)
    for record in found:
        if record.get("palette"):
            del record["palette"]["timing_ms"]
    return found


async def test_every_prompt_is_answered_once(aligner, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    calls = []
    assert await run(aligner, out, progress=lambda *call: calls.append(call)) == 0
    found = records(out)
    assert [record["index"] for record in found] == list(range(12))
    assert calls == [(i, 12) for i in range(13)]
    for record, prompt in zip(found, PROMPTS, strict=True):
        assert record["messages"] == list(prompt)
        assert record["palette"]["status"] == "met"
        assert record["palette"]["realised"]["words"] == len(record["answer"].split())
        assert record["finish_reason"] == "stop"
    assert len({record["answer"] for record in found}) > 6


async def test_without_a_palette(aligner, tmp_path):
    await run(aligner, tmp_path / "out.jsonl", palette=None)
    assert all(record["palette"] is None for record in records(tmp_path / "out.jsonl"))


async def test_concurrency_does_not_show(aligner, tmp_path):
    for concurrency in (1, 4, 30):
        await run(aligner, tmp_path / f"{concurrency}.jsonl", concurrency=concurrency)
    first, *others = [answers(tmp_path / f"{n}.jsonl") for n in (1, 4, 30)]
    assert all(other == first for other in others)


async def test_more_at_once_than_the_queue_takes(tmp_path, settings):
    small = settings.model_copy(update={"max_running": 1, "max_queue": 1})
    async with run_fake(tmp_path, small) as running:
        out = tmp_path / "out.jsonl"
        await run(running.context.aligner, out, concurrency=8)
    assert len(records(out)) == 12


async def test_seeds_differ(aligner, tmp_path):
    for seed in (0, 1):
        await run(aligner, tmp_path / f"{seed}.jsonl", seed=seed)
    first, second = [[r["answer"] for r in records(tmp_path / f"{s}.jsonl")] for s in (0, 1)]
    assert sum(one != other for one, other in zip(first, second, strict=True)) > 6


# stopped and continued


async def test_stopped_at_arbitrary_moments_and_continued(aligner, tmp_path):
    whole = tmp_path / "whole.jsonl"
    await run(aligner, whole)
    rng = np.random.default_rng(0)
    n_stops = 0
    for trial in range(12):
        out = tmp_path / f"{trial}.jsonl"
        have = 0
        while True:
            turns = int(rng.integers(1, 150))
            if await stopped_after(turns, run(aligner, out, concurrency=1 + trial % 4)):
                break
            before, have = have, len(records(out)) if out.exists() else 0
            assert have >= before  # nothing is lost
            n_stops += 1
        assert answers(out) == answers(whole)
    assert n_stops > 5
    assert aligner.admission.n_running == aligner.admission.n_waiting == 0


async def test_continuing_answers_only_what_is_missing(aligner, tmp_path):
    out = tmp_path / "out.jsonl"
    await run(aligner, out)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3] + lines[5:]))
    n_before = aligner.backend.n_started
    calls = []
    await run(aligner, out, progress=lambda *call: calls.append(call))
    assert aligner.backend.n_started - n_before == 2
    assert calls == [(10, 12), (11, 12), (12, 12)]
    assert len(records(out)) == 12
    await run(aligner, out)
    assert aligner.backend.n_started - n_before == 2


async def test_torn_last_line_is_written_anew(aligner, tmp_path):
    whole = tmp_path / "whole.jsonl"
    await run(aligner, whole, PROMPTS, concurrency=1)
    data = whole.read_bytes()
    last = data.rindex(b"\n", 0, len(data) - 1) + 1
    out = tmp_path / "out.jsonl"
    for end in [last + 1, (last + len(data)) // 2, len(data) - 2, len(data) - 1]:
        out.write_bytes(data[:end])
        await run(aligner, out, concurrency=1)
        assert answers(out) == answers(whole)


async def test_line_torn_inside_a_character(tmp_path, settings):
    async with run_fake(tmp_path, settings) as running:
        aligner = running.context.aligner
        prompts = prompts_of("où?", "où, donc?")
        out = tmp_path / "out.jsonl"
        await run(aligner, out, prompts, concurrency=1)
        whole, data = answers(out), out.read_bytes()
        out.write_bytes(data[: data.rindex("ù".encode()) + 1])
        await run(aligner, out, prompts, concurrency=1)
        assert answers(out) == whole


# other files, other runs


@pytest.mark.parametrize(
    "content",
    [
        "hello\n", "[]\n", "1\n", "null\n", '{"index": 0}\n', '{"run": "x"}\n', "\n", "\x00\n",
        '{"index": [0], "run": "KEY"}\n', '{"index": "0", "run": "KEY"}\n',
        '{"index": 99, "run": "KEY"}\n', '{"index": -1, "run": "KEY"}\n',
        '{"index": true, "run": "KEY"}\n', "[" * 100_000 + "\n",
    ],
)  # fmt: skip
async def test_foreign_file_is_left_alone(aligner, tmp_path, content):
    probe = tmp_path / "probe.jsonl"
    await run(aligner, probe)
    content = content.replace("KEY", records(probe)[0]["run"])
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    with pytest.raises(OutputError) as caught:
        await run(aligner, out)
    assert str(out) in str(caught.value)
    assert "another file" in str(caught.value)
    assert out.read_text() == content


async def test_foreign_file_without_a_line_end_is_left_alone(aligner, tmp_path):
    out = tmp_path / "thesis.txt"
    out.write_text("all my work")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        await run(aligner, out)
    assert out.read_text() == "all my work"


@pytest.mark.parametrize(
    "change",
    [
        {"palette": PaletteOptions(targets={"words": {"at_most": 9.0}}, candidates=4)},
        {"palette": SHORT.model_copy(update={"candidates": 5})},
        {"palette": None},
        {"sampling": SamplingSettings(temperature=0.5)},
        {"seed": 1},
        {"prompts": PROMPTS[:5]},
        {"prompts": PROMPTS[::-1]},
    ],
    ids=["targets", "candidates", "none", "sampling", "seed", "fewer", "order"],
)
async def test_another_run_does_not_mix_in(aligner, tmp_path, change):
    out = tmp_path / "out.jsonl"
    await run(aligner, out)
    before = out.read_bytes()
    with pytest.raises(OutputError, match="another"):
        await run(aligner, out, **change)
    assert out.read_bytes() == before


async def test_another_model_or_calibration_does_not_mix_in(aligner, tmp_path):
    out = tmp_path / "out.jsonl"
    await run(aligner, out)
    aligner.backend.fingerprint = "e" * 64
    with pytest.raises(OutputError, match="another"):
        await run(aligner, out)
    aligner.backend.fingerprint = "f" * 64
    aligner.calibration = None
    with pytest.raises(OutputError, match="another"):
        await run(aligner, out)


def test_no_file_has_no_answers(tmp_path):
    assert answered(tmp_path / "none.jsonl", "key", 1) == {}


# prompts that cannot be answered, and failures


async def test_refused_prompts_are_recorded(tmp_path, settings):
    class Picky(FakeBackend):
        async def render(self, messages, tools=None):
            if messages[0]["content"] == "Question 3":
                raise PromptError("the template says no")
            return await super().render(messages)

    async with run_fake(tmp_path, settings, Picky()) as running:
        aligner, out = running.context.aligner, tmp_path / "out.jsonl"
        prompts = PROMPTS + prompts_of("word " * 600)
        assert await run(aligner, out, prompts) == 2
        found = records(out)
        assert len(found) == 13
        for index, reason in ((3, "template says no"), (12, "maximum context")):
            assert found[index]["answer"] is None
            assert reason in found[index]["error"]
        assert all("error" not in found[index] for index in (0, 4, 11))
        # A run that only finds it complete still says that two have no answer.
        assert await run(aligner, out, prompts) == 2


async def test_answer_that_no_floor_lets_through_is_no_refused_prompt(aligner, tmp_path):
    palette = PaletteOptions(floors={"words": 19}, candidates=2)
    out = tmp_path / "out.jsonl"
    assert await run(aligner, out, palette=palette) == 0
    reasons = {record["finish_reason"]: record["answer"] for record in records(out)}
    assert reasons["content_filter"] is None


async def test_failure_ends_the_run_and_keeps_what_was_answered(tmp_path, settings):
    backend, out = Breaks(), tmp_path / "out.jsonl"
    async with run_fake(tmp_path, settings, backend) as running:
        aligner = running.context.aligner
        with pytest.raises(BackendError, match="broke"):
            await run(aligner, out, concurrency=1)
        assert [record["index"] for record in records(out)] == list(range(6))
        backend.breaks = False
        await run(aligner, out, concurrency=1)
        await run(aligner, tmp_path / "whole.jsonl")
    assert answers(out) == answers(tmp_path / "whole.jsonl")


@pytest.mark.parametrize(
    ("palette", "error"),
    [
        (PaletteOptions(targets={"words": {"at_least": 30}}), InfeasiblePaletteError),
        (PaletteOptions(targets={"wrods": "keep"}), UnknownValueError),
    ],
)
async def test_palette_that_cannot_be_served_is_told_before_anything(
    aligner, tmp_path, palette, error
):
    with pytest.raises(error):
        await run(aligner, tmp_path / "out.jsonl", palette=palette)
    assert aligner.backend.n_started == 0


async def test_cancelled_run_frees_the_backend(tmp_path, settings):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, settings, backend) as running:
        task = asyncio.create_task(run(running.context.aligner, tmp_path / "out.jsonl"))
        await until(lambda: backend.n_started == 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert backend.n_cancelled == 3
