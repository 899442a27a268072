"""Batched scores against transformers' own, one text at a time."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import transformers

from rewards import RewardModelError, Sample
from rewards.base import Tokens
from rewards.config import SequenceClassifierConfig
from rewards.models.sequence_classifier import SequenceClassifier
from tests.rewards.golden import assert_batches_agree, samples
from tests.rewards.tiny import CAUSAL, ENCODERS

PAIR = {"view": "pair"}
TEXT = {"view": "text", "text": "{answer}"}


def load(folder, *, values=("kind",), **fields):
    fields = {"kind": "sequence_classifier", "model": "m", "input": TEXT, **fields}
    scorer = SequenceClassifier("s", values, SequenceClassifierConfig(**fields), folder)
    scorer.load("cpu")
    return scorer


def one_by_one(folder, encode, wanted, max_length):
    """Return transformers' scores, without padding: a batch is one text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.truncation_side = "left"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None if hasattr(model, "score") else model.config.pad_token_id
    scores = []
    for sample in wanted:
        inputs = encode(tokenizer, sample, max_length)
        with torch.inference_mode():
            scores.append(model(**inputs).logits[0, 0].item())
    return np.array(scores)


def encode_pair(tokenizer, sample, max_length):
    return tokenizer(
        sample.messages[-1]["content"],
        sample.answer,
        truncation="only_first",
        max_length=max_length,
        return_tensors="pt",
    )


def encode_text(tokenizer, sample, max_length):
    tokenizer.truncation_side = "right"
    return tokenizer(sample.answer, truncation=True, max_length=max_length, return_tensors="pt")


def encode_chat(tokenizer, sample, max_length):
    dialogue = [*sample.messages, {"role": "assistant", "content": sample.answer}]
    return tokenizer.apply_chat_template(dialogue, return_tensors="pt", return_dict=True)


@pytest.mark.parametrize("architecture", ENCODERS + CAUSAL)
def test_text_scores_through_truncation(architecture, tiny_model):
    folder = tiny_model(architecture)
    wanted = samples(longest=30)
    scorer = load(folder, max_length=40)
    assert_batches_agree(scorer, wanted, one_by_one(folder, encode_text, wanted, 40))


@pytest.mark.parametrize("architecture", ENCODERS + CAUSAL)
def test_pair_scores_cut_the_prompt_only(architecture, tiny_model):
    folder = tiny_model(architecture)
    wanted = samples(longest=4)  # the answer fits, prompt and answer often do not
    scorer = load(folder, input=PAIR, max_length=48)
    assert_batches_agree(scorer, wanted, one_by_one(folder, encode_pair, wanted, 48))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_chat_scores_with_padding_that_is_also_the_end(architecture, tiny_model):
    folder = tiny_model(architecture)
    wanted = samples(longest=3)
    scorer = load(folder, input={"view": "chat"})
    expected = one_by_one(folder, encode_chat, wanted, None)
    inputs = scorer.encode([scorer.render(sample) for sample in wanted])
    assert all(tokens.ids[-1] == 2 for tokens in inputs), "each ends with the end token"
    assert all(tokens.ids[:2].count(0) == 1 for tokens in inputs), "and starts with one BOS"
    assert_batches_agree(scorer, wanted, expected)


def test_chat_may_drop_the_system_message(tiny_model):
    system = {"role": "system", "content": "be brief"}
    sample = Sample((system, {"role": "user", "content": "hi"}), " hello ")
    kept = load(tiny_model("llama"), input={"view": "chat"}).render(sample)
    dropped = load(tiny_model("llama"), input={"view": "chat", "system": "drop"}).render(sample)
    assert kept.text == "<s>system\nbe brief</s>" + dropped.text
    assert dropped.text == "<s>user\nhi</s><s>assistant\nhello</s>"
    assert dropped.text[dropped.start : dropped.end] == "hello"


@pytest.mark.parametrize("answer", ["s", "</s>", "", "user", "a </s>"])
def test_the_place_of_an_answer_that_looks_like_the_template(answer, tiny_model):
    scorer = load(tiny_model("llama"), input={"view": "chat"})
    rendered = scorer.render(Sample(({"role": "user", "content": "hi"},), answer))
    assert rendered.text[rendered.start : rendered.end] == answer
    assert rendered.text[rendered.end :] == "</s>"


@pytest.mark.parametrize(
    ("output", "read"),
    [
        ({"index": 1}, lambda x: x[1]),
        ({"label": "LABEL2", "sign": -1}, lambda x: -x[2]),
        ({"margin": ["LABEL2", "LABEL0"]}, lambda x: x[2] - x[0]),
        ({"margin": [2, 0], "activation": "softmax"}, lambda x: softmax(x)[2] - softmax(x)[0]),
        ({"index": 1, "activation": "sigmoid"}, lambda x: 1 / (1 + np.exp(-x[1]))),
        ({"index": 1, "activation": "log_sigmoid"}, lambda x: -np.log1p(np.exp(-x[1]))),
    ],
)
def test_readings_of_several_labels(output, read, tiny_model):
    folder = tiny_model("bert", n_labels=3)
    logits = [
        load(folder, output={"index": i}).forward([Tokens([2, 9, 3], [0, 0, 0])])[0, 0]
        for i in range(3)
    ]
    score = load(folder, output=output).forward([Tokens([2, 9, 3], [0, 0, 0])])[0, 0]
    np.testing.assert_allclose(score, read(np.array(logits)), rtol=1e-5)


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize("output", [{}, {"label": "GOOD"}, {"index": 3}, {"margin": [0, 7]}])
def test_a_label_that_is_not_there_or_not_chosen(output, tiny_model):
    with pytest.raises(RewardModelError, match=r"'s' \(feeds kind\).*0: LABEL0, 1: LABEL1"):
        load(tiny_model("bert", n_labels=3), output=output)


def test_empty_texts_have_a_score(tiny_model):
    for architecture in ("bert", "gpt2"):
        scorer = load(tiny_model(architecture))
        sample = Sample(({"role": "user", "content": ""},), "")
        assert np.isfinite(scorer.forward(scorer.encode([scorer.render(sample)]))).all()


@pytest.mark.parametrize(
    ("architecture", "positions"), [("bert", 64), ("roberta", 64), ("gpt2", 64), ("llama", 160)]
)
def test_the_longest_input_is_what_the_model_has_positions_for(architecture, positions, tiny_model):
    scorer = load(tiny_model(architecture))
    assert scorer.max_length == positions
    text = Sample(({"role": "user", "content": "q"},), "a b c " * 100)
    assert len(scorer.encode([scorer.render(text)])[0]) == positions
    with pytest.raises(RewardModelError, match=f"more than the {positions} it reads"):
        load(tiny_model(architecture), max_length=positions + 1)


def test_truncation_of_the_tokenizer_file_is_ignored(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("bert"), tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    scorer = load(folder)
    rendered = [scorer.render(Sample((), text)) for text in ("a", "a b c d e f g")]
    assert [len(tokens) for tokens in scorer.encode(rendered)] == [3, 9]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_half_precision_heads_stay_fine_grained(architecture, tiny_model):
    exact = load(tiny_model(architecture))
    half = load(tiny_model(architecture), dtype="bfloat16")
    inputs = exact.encode([exact.render(sample) for sample in samples()])
    scores = half.forward(inputs)[:, 0]
    assert np.corrcoef(scores, exact.forward(inputs)[:, 0])[0, 1] > 0.95
    coarse = torch.tensor(scores).to(torch.bfloat16).double().numpy()
    assert (scores != coarse).mean() > 0.8, "scores are rounded to bfloat16"


def test_an_architecture_that_minds_padding_is_refused(tiny_model, monkeypatch):
    def pad_left(batch, pad_id):
        from rewards.batch import pad

        return tuple(np.ascontiguousarray(array[:, ::-1]) for array in pad(batch, pad_id))

    monkeypatch.setattr("rewards.models.transformer.pad", pad_left)
    with pytest.raises(RewardModelError, match="alone than padded in a batch"):
        load(tiny_model("gpt2"))
