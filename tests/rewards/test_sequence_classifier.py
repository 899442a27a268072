"""Batched scores against transformers' own, one text at a time."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError

from rewards import RewardModelError, Sample
from rewards.base import Tokens
from rewards.config import OutputConfig, SequenceClassifierConfig
from rewards.models.readout import Readout
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
        (
            {"index": 1, "activation": "log_odds"},
            lambda x: np.log(softmax(x)[1]) - np.log1p(-softmax(x)[1]),
        ),
        (
            {"expect": {"LABEL2": 3, "LABEL0": -1.5, "LABEL1": 0}, "sign": -1},
            lambda x: -(softmax(x) @ [-1.5, 0, 3]),
        ),
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


def test_log_odds_where_the_probability_rounds_to_one():
    read = Readout(OutputConfig(index=0, activation="log_odds"), {0: "a", 1: "b", 2: "c"})
    logits = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)
    np.testing.assert_array_equal(read(logits), read(SimpleNamespace(logits=logits)))
    np.testing.assert_allclose(read(SimpleNamespace(logits=logits)), 60 - np.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ({"expect": {"LABEL0": 1, "LABEL1": 2}}, "expect has no number for LABEL2"),
        ({"expect": {"LABEL0": 1, "LABEL3": 2}}, "no label 'LABEL3'"),
    ],
)
def test_numbers_of_labels_that_are_not_all_there(output, problem, tiny_model):
    with pytest.raises(RewardModelError, match=problem):
        load(tiny_model("bert", n_labels=3), output=output)


def test_log_odds_of_the_only_label(tiny_model):
    with pytest.raises(RewardModelError, match="whose logit is the log-odds already"):
        load(tiny_model("bert"), output={"index": 0, "activation": "log_odds"})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"output": {"expect": {"a": 1, "b": 2}, "label": "a"}}, "label and expect exclude"),
        ({"output": {"expect": {"a": 1, "b": 2}, "activation": "softmax"}}, "by itself"),
        ({"output": {"expect": {"a": 1, "b": float("nan")}}}, "number of b is nan"),
        ({"output": {"activation": "log_odds"}}, "set label or index"),
        ({"output": {"attribute": "score"}}, "trust_remote_code: true"),
        ({"output": {"attribute": "__class__"}}, "is no name"),
        ({"output": {"attribute": "x", "label": "a"}}, "only an index"),
        ({"output": {"attribute": "x", "index": 1, "activation": "softmax"}}, "no softmax"),
    ],
)
def test_readings_that_make_no_sense(fields, problem):
    with pytest.raises(ValidationError, match=problem):
        SequenceClassifierConfig(kind="sequence_classifier", model="m", input=TEXT, **fields)


MODEL_CODE = """
from dataclasses import dataclass
import torch
from transformers import LlamaForSequenceClassification
from transformers.utils import ModelOutput

@dataclass
class Output(ModelOutput):
    rewards: torch.Tensor = None
    score: torch.Tensor = None
    logits: torch.Tensor = None

class ManyRewards(LlamaForSequenceClassification):
    def forward(self, **inputs):
        logits = super().forward(**inputs).logits
        return Output(rewards=logits, score=logits.sum(dim=-1), logits=logits)
"""


@pytest.fixture
def armo(tiny_model, tmp_path):
    """Return a model with code of its own, which gives 5 rewards and their gated sum."""
    folder = shutil.copytree(tiny_model("llama", n_labels=5), tmp_path / "armo")
    (folder / "many_rewards.py").write_text(MODEL_CODE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "many_rewards.ManyRewards"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_attributes_of_a_model_with_its_own_code(armo, tiny_model):
    outputs = {
        "third": {"attribute": "rewards", "index": 2},
        "short": {"attribute": "rewards", "index": 4, "sign": -1},
        "all": {"attribute": "score"},
        "plain": {"index": 1},
    }
    scorer = load(armo, trust_remote_code=True, outputs=outputs)
    plain = load(tiny_model("llama", n_labels=5), outputs={f"o{i}": {"index": i} for i in range(5)})
    inputs = plain.encode([plain.render(sample) for sample in samples(n=5)])
    logits = plain.forward(inputs)
    expected = np.stack([logits[:, 2], -logits[:, 4], logits.sum(axis=1), logits[:, 1]], axis=1)
    np.testing.assert_allclose(scorer.forward(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ({"attribute": "reward"}, "no numbers 'reward'; it has rewards, score, logits"),
        ({"attribute": "rewards"}, "rewards holds 5 numbers, and none is chosen"),
        ({"attribute": "rewards", "index": 5}, "rewards holds 5 numbers; there is no index 5"),
    ],
)
def test_attributes_that_are_not_there(output, problem, armo):
    with pytest.raises(RewardModelError, match=problem):
        load(armo, trust_remote_code=True, output=output)


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
