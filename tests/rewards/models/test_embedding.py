"""Cosines of batches against transformers' own embeddings, one text at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError

from rewards import RewardModelError, Sample
from rewards.config import EmbeddingConfig
from rewards.models import embedding
from rewards.models.embedding import EmbeddingScorer
from tests.rewards.golden import assert_batches_agree, samples
from tests.rewards.tiny import CAUSAL, ENCODERS

POOLERS = ["bert", "roberta", "xlm-roberta"]


@pytest.fixture
def model(tiny_model):
    return lambda architecture: tiny_model(architecture, auto="AutoModel")


def load(folder, **fields):
    fields = {"kind": "embedding", "model": "m", "pooling": "mean", **fields}
    scorer = EmbeddingScorer("s", ["near"], EmbeddingConfig(**fields), folder)
    scorer.load("cpu")
    return scorer


def cosines(folder, pairs, pooling, max_length):
    """Return transformers' cosines; one text at a time, so nothing is padded."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.truncation_side = "right"
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def embed(text):
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            given = model(**inputs)
        states = given.last_hidden_state[0]
        return {
            "mean": lambda: states.mean(dim=0),
            "cls": lambda: states[0],
            "last": lambda: states[-1],
            "pooler": lambda: given.pooler_output[0],
        }[pooling]().numpy()

    vectors = [(embed(a), embed(b)) for a, b in pairs]
    return np.array([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in vectors])


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [
        *((name, "mean") for name in ENCODERS),
        *((name, "pooler") for name in POOLERS),
        ("bert", "cls"),
        *((name, "last") for name in CAUSAL),
    ],
)
def test_cosines_through_truncation(architecture, pooling, model):
    folder = model(architecture)
    scorer = load(folder, pooling=pooling, max_length=40)
    wanted = samples(longest=16)
    pairs = [(one.messages[-1]["content"], one.answer) for one in wanted]
    assert_batches_agree(scorer, wanted, cosines(folder, pairs, pooling, 40))


def test_templates_and_white_space(model):
    folder = model("bert")
    scorer = load(folder, a="query: {prompt}", b="passage: {answer}", strip=True)
    sample = Sample(({"role": "user", "content": "who"},), "  me\n")
    expected = cosines(folder, [("query: who", "passage: me")], "mean", 64)
    given = scorer.forward(scorer.encode([scorer.render(sample)]))
    np.testing.assert_allclose(given, expected, atol=1e-6)


def test_a_prompt_is_embedded_once(model, monkeypatch):
    scorer = load(model("bert"))
    asked = []
    embed = scorer._embed
    monkeypatch.setattr(
        scorer, "_embed", lambda batch: asked.append([len(one) for one in batch]) or embed(batch)
    )
    question = ({"role": "user", "content": "abc"},)
    inputs = scorer.encode([scorer.render(Sample(question, "d" * n)) for n in (1, 2, 3)])
    scorer.forward(inputs[:2])
    scorer.forward(inputs[2:])
    assert asked == [[5], [3, 4], [5]]


def test_only_so_many_prompts_are_remembered(model, monkeypatch):
    monkeypatch.setattr(embedding, "_REMEMBERED", 3)
    scorer = load(model("bert"))
    wanted = samples(n=9, longest=4)
    inputs = scorer.encode([scorer.render(one) for one in wanted])
    scores = scorer.forward(inputs)
    assert len(scorer._known) == 3
    np.testing.assert_allclose(scorer.forward(inputs[::-1])[::-1], scores, atol=1e-6)


def test_a_pooler_that_was_never_trained(tiny_model, tmp_path):
    # A classifier of DeBERTa has one of its own; the plain encoder gives none.
    with pytest.raises(RewardModelError, match="gives no pooler_output; set another pooling"):
        load(tiny_model("deberta-v2", auto="AutoModel"), pooling="pooler")
    masked = tiny_model("bert", auto="AutoModelForMaskedLM")
    with pytest.raises(RewardModelError, match=r"lack pooler\.dense.*another pooling"):
        load(masked, pooling="pooler")
    load(masked, pooling="mean")


def test_mistakes_in_the_file():
    with pytest.raises(ValidationError, match=r"b must hold .answer. once"):
        EmbeddingConfig(kind="embedding", model="m", pooling="mean", b="{prompt}")
