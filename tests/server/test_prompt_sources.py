"""Where calibration prompts come from: files, data sets, samples, system prompts."""

from __future__ import annotations

import json
import sys
from itertools import islice
from types import SimpleNamespace

import pytest

from server import embedded
from server.prompt_sources import DATASET_PROMPTS, PromptSource
from server.prompts import PromptsError, read_prompts

ROWS = [{"prompt": f"Question {i}", "id": i} for i in range(1000)]


class Rows(list):
    """A stream of the library, as far as it is used."""

    def shuffle(self, seed, buffer_size):
        order = sorted(range(len(self)), key=lambda i: (hash((seed, i)), i))
        return Rows(self[i] for i in order)


@pytest.fixture
def hub(monkeypatch):
    """Return what was asked of a stand-in for `datasets`, whose rows and failure can be set."""
    seen = SimpleNamespace(asked=[], rows=Rows(ROWS), failure=None, version="4.5.0")

    def load_dataset(name, **options):
        seen.asked.append((name, options))
        if seen.failure is not None:
            raise seen.failure
        return seen.rows

    module = SimpleNamespace(load_dataset=load_dataset, __version__=seen.version)
    monkeypatch.setitem(sys.modules, "datasets", module)
    seen.module = module
    return seen


def texts(prompts):
    return [messages[-1]["content"] for messages in prompts]


# files


def test_shipped_prompts_by_default():
    found, source = PromptSource().read(0)
    assert found == read_prompts(embedded.PROMPTS)
    assert source == "the shipped general prompts"


def test_first_and_sample_of_a_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row["prompt"]) + "\n" for row in ROWS))
    first, source = PromptSource(path, limit=5).read(0)
    assert texts(first) == [row["prompt"] for row in ROWS[:5]]
    assert source == "mine.jsonl"
    samples = [
        texts(PromptSource(path, limit=5, is_sample=True).read(seed)[0]) for seed in (0, 0, 1)
    ]
    assert samples[0] == samples[1] != samples[2]
    assert samples[0] != texts(first)
    assert len(set(samples[0])) == 5


def test_system_prompt_takes_the_place_of_others(tmp_path):
    path = tmp_path / "mine.jsonl"
    system, user = {"role": "system", "content": "Old."}, {"role": "user", "content": "Hi"}
    path.write_text(json.dumps("Hi") + "\n" + json.dumps([system, user]) + "\n")
    found, _ = PromptSource(path, system="New.").read(0)
    assert found == [({"role": "system", "content": "New."}, user)] * 2


# data sets


def test_first_rows_of_a_data_set(hub):
    found, source = PromptSource(dataset="owner/name", limit=7).read(0)
    assert texts(found) == [row["prompt"] for row in ROWS[:7]]
    assert hub.asked == [("owner/name", {"split": "train", "streaming": True})]
    assert source == "data set owner/name, column prompt"
    assert len(PromptSource(dataset="owner/name").read(0)[0]) == DATASET_PROMPTS


def test_split_column_and_sample(hub):
    hub.rows = Rows({"question": f"Q{i}"} for i in range(50))
    source = PromptSource(
        dataset="owner/name:test", column="question", limit=7, is_sample=True, system="Be brief."
    )
    one, again, other = (source.read(seed)[0] for seed in (1, 1, 2))
    assert hub.asked[0][1]["split"] == "test"
    assert one == again != other
    assert one[0][0] == {"role": "system", "content": "Be brief."}


def test_no_more_rows_are_read_than_needed(hub):
    def endless():
        i = 0
        while True:
            yield {"prompt": f"Question {i}"}
            i += 1

    hub.rows = endless()
    assert len(PromptSource(dataset="owner/name", limit=3).read(0)[0]) == 3
    assert next(iter(islice(hub.rows, 1)))["prompt"] == "Question 3"


def test_conversations_end_before_the_answer(hub):
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    hub.rows = Rows([{"messages": [user, answer, user, answer]}, {"messages": [user]}])
    found, _ = PromptSource(dataset="owner/name", column="messages").read(0)
    assert found == [(user, answer, user), (user,)]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "a", "id": 1}], "no column 'prompt'; it has id, text"),
        ([{"prompt": "a"}, {"prompt": None}], "row 2, column 'prompt'"),
        ([{"prompt": 3}], "row 1"),
        ([{"prompt": [{"role": "assistant", "content": "a"}]}], "row 1"),
        ([], "no rows"),
    ],
)
def test_rows_that_are_no_prompts(hub, rows, told):
    hub.rows = Rows(rows)
    with pytest.raises(PromptsError, match="--dataset owner/name") as caught:
        PromptSource(dataset="owner/name").read(0)
    assert told in str(caught.value)


@pytest.mark.parametrize("failure", [ConnectionError("no route\nto host"), RuntimeError()])
def test_data_set_that_cannot_be_had(hub, failure):
    hub.failure = failure
    with pytest.raises(PromptsError, match="reaches the hub") as caught:
        PromptSource(dataset="owner/name").read(0)
    assert ("no route;" in str(caught.value)) == bool(failure.args)
    assert "\n" not in str(caught.value)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptsError, match=r"palette-server\[datasets\]"):
        PromptSource(dataset="owner/name").read(0)


def test_library_that_would_run_code_of_a_data_set(hub):
    hub.module.__version__ = "3.6.0"
    with pytest.raises(PromptsError, match="datasets 4 or newer"):
        PromptSource(dataset="owner/name").read(0)
    assert hub.asked == []
