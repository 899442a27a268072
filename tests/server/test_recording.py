"""Prompts are recorded only when the operator says so, for nobody else to read, and to an end."""

from __future__ import annotations

import json
import stat
from types import SimpleNamespace

import pytest

from server.alignment_stages import AlignmentRequest
from server.backends.base import SamplingSettings, Tools
from server.prompts import read_prompts
from server.recording import PromptRecorder
from tests.server.conftest import chat_body, run_fake
from tests.server.fakes import EVERYTHING, FakeBackend

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def served(text="Hi", **fields):
    messages = [{"role": "user", "content": text}]
    request = AlignmentRequest(tuple(messages), SamplingSettings(), 1, 0, **fields)
    return SimpleNamespace(plan=SimpleNamespace(request=request))


def recorded(path, *all_served, **options):
    recorder = PromptRecorder(path, **options)
    for one in all_served:
        recorder.note(one)
    recorder.close()


def texts(path):
    return [messages[-1]["content"] for messages in read_prompts(path)]


async def test_off_by_default(tmp_path, settings):
    assert settings.record_prompts is None
    async with run_fake(tmp_path, settings) as running:
        assert (await running.chat()).status_code == 200
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".jsonl"]


async def test_served_conversations_are_there_to_calibrate_on(tmp_path, settings):
    path = tmp_path / "deep" / "prompts.jsonl"
    ours = settings.model_copy(update={"record_prompts": path})
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hé 😀"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": [{"type": "text", "text": "More\nof it."}]},
    ]
    async with run_fake(tmp_path, ours, FakeBackend(features=EVERYTHING)) as running:
        await running.chat(messages=talk, palette={"targets": {"words": "keep"}}, n=2)
        await running.chat(stream=True)
        assert (await running.chat(messages=[])).status_code == 400  # not served
        await running.chat(tools=[TOOL])
        await running.client.post("/v1/completions", json={"model": "fake", "prompt": "Once"})
    first, second = read_prompts(path)
    assert first == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hé 😀"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "More\nof it."},
    )
    assert list(second) == chat_body()["messages"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_cannot_be_calibrated_on_is_left_out(tmp_path):
    path = tmp_path / "prompts.jsonl"
    tools = Tools((json.dumps(TOOL),))
    answer = served()
    answer.plan.request.messages[0]["role"] = "tool"
    recorded(path, served(tools=tools), served(text="x"), answer, served("kept"))
    assert texts(path) == ["x", "kept"]


def test_an_earlier_file_is_continued_and_closed_to_others(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n"two"\n{"messages": [{"role": "us')
    path.chmod(0o644)
    recorded(path, served("three"))
    assert texts(path) == ["one", "two", "three"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("n_long", [1, 70_000, 200_000])
def test_a_long_line_that_was_cut_off_is_removed(tmp_path, n_long):
    path = tmp_path / "prompts.jsonl"
    for whole in (b"", b'"one"\n'):
        path.write_bytes(whole + b"x" * n_long)
        recorded(path, served("two"))
        assert texts(path) == ["one", "two"][not whole :]


def test_size_has_a_limit_and_the_newest_stay(tmp_path):
    path = tmp_path / "prompts.jsonl"
    recorded(path, *(served(f"question {i:04}") for i in range(1000)), full_bytes=5000)
    older = path.with_name("prompts.jsonl.1")
    assert path.stat().st_size <= 5000
    assert older.stat().st_size <= 5000
    assert stat.S_IMODE(older.stat().st_mode) == 0o600
    found = texts(older) + texts(path)
    assert found == [f"question {i:04}" for i in range(1000 - len(found), 1000)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, older.name]


def test_links_are_not_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="link"):
        PromptRecorder(tmp_path / "link")
    assert not (tmp_path / "target").exists()


def test_a_failing_disk_ends_the_recording_only(tmp_path, caplog):
    path = tmp_path / "prompts.jsonl"
    recorder = PromptRecorder(path)

    class Full:
        def tell(self):
            return 0

        def write(self, line):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    recorder._file.close()
    recorder._file = Full()
    for _ in range(3000):  # more than may wait
        recorder.note(served())
    recorder.close()
    assert caplog.text.count("No space left") == 1
    assert "Hi" not in caplog.text


async def test_a_file_that_cannot_be_written_stops_the_start(tmp_path, settings):
    (tmp_path / "file").write_text("")
    ours = settings.model_copy(update={"record_prompts": tmp_path / "file" / "prompts.jsonl"})
    backend = FakeBackend()
    with pytest.raises(OSError, match="file"):
        async with run_fake(tmp_path, ours, backend):
            pass
    assert not backend.is_up
