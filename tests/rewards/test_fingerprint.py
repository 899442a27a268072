"""The fingerprint tells whether a calibration still fits: same numbers, same fingerprint."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from rewards import load_rewards
from rewards.config import LexicalConfig, SequenceClassifierConfig

CONFIG = """\
version: 1
scorers:
  kindness:
    kind: sequence_classifier
    model: m
    input: {view: text}
    max_length: 50
  count: {kind: lexical, measure: words}
values:
  kind: {from: kindness, description: Kind., unit: logit}
  words: {from: count}
"""


@pytest.fixture
def fingerprint(tiny_model, tmp_path):
    shutil.copytree(tiny_model("bert"), tmp_path / "m")

    async def get(old="", new="", device="cpu", **options):
        assert old in CONFIG
        path = tmp_path / "rewards.yaml"
        path.write_text(CONFIG.replace(old, new) if old else CONFIG)
        async with load_rewards(path, device=device, **options) as suite:
            return suite.fingerprint

    return get


async def test_the_same_numbers(fingerprint, tmp_path):
    first = await fingerprint()
    assert await fingerprint() == first
    assert await fingerprint("Kind.", "Is kind to people.") == first
    assert await fingerprint("unit: logit", "unit: points") == first
    assert await fingerprint("count", "counter") == first
    assert await fingerprint(max_batch_tokens=100, cache_entries=0) == first
    (tmp_path / "m" / "README.md").write_text("about the model")
    assert await fingerprint() == first
    shutil.copytree(tmp_path / "m", tmp_path / "elsewhere")
    assert await fingerprint("model: m", "model: ./elsewhere") == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_length: 50", "max_length: 40"),
        ("{view: text}", '{view: text, text: "{prompt} {answer}"}'),
        ("max_length: 50", "output: {sign: -1}"),
        ("measure: words", "measure: lexical_diversity"),
        ("  words: {from: count}\n", ""),
        ("  words: {from", "  length: {from"),
        ("max_length: 50", "max_length: 50\n    dtype: bfloat16"),
    ],
)
async def test_other_settings(old, new, fingerprint):
    assert await fingerprint(old, new) != await fingerprint()


async def test_other_weights_or_tokenizer(fingerprint, tmp_path):
    seen = {await fingerprint()}
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    weights["classifier.bias"] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    seen.add(await fingerprint())
    path = tmp_path / "m" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    seen.add(await fingerprint())
    assert len(seen) == 3


def test_fields_that_came_later_count_only_when_set():
    """Calibrations made before them still fit: what they were made with is dumped as it was."""
    old = SequenceClassifierConfig(kind="sequence_classifier", model="m", input={"view": "text"})
    assert old.input.model_dump() == {"view": "text", "text": "{answer}"}
    assert set(old.output.model_dump()) == {"label", "index", "margin", "activation", "sign"}
    pair = SequenceClassifierConfig(kind="sequence_classifier", model="m", input={"view": "pair"})
    assert pair.input.model_dump() == {"view": "pair", "a": "{prompt}", "b": "{answer}"}
    chat = SequenceClassifierConfig(kind="sequence_classifier", model="m", input={"view": "chat"})
    assert chat.input.model_dump() == {"view": "chat", "system": "keep"}
    words = LexicalConfig(kind="lexical", measure="words")
    assert words.model_dump() == {"kind": "lexical", "measure": "words"}
    asked = {"view": "chat", "question": "Is it?"}
    new = SequenceClassifierConfig(kind="sequence_classifier", model="m", input=asked)
    assert new.input.model_dump() == {**asked, "system": "keep"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("measure: words", 'measure: words, text: "{prompt}{answer}"'),
        ("{view: text}", "{view: text, strip: true}"),
    ],
)
async def test_fields_that_came_later_count_when_set(old, new, fingerprint):
    assert await fingerprint(old, new) != await fingerprint()
