"""Scores of steps against transformers' own, one text at a time, and what becomes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from transformers import AddedToken

from rewards import RewardModelError, Sample
from rewards.config import ProcessRewardConfig
from rewards.models.process_reward import ProcessReward
from tests.rewards.golden import assert_batches_agree, words

TEXT = {"view": "text", "text": "{prompt}\n{answer}"}
QUESTION = {"role": "user", "content": "how many"}
REDUCE = {"min": np.min, "mean": np.mean, "prod": np.prod, "last": lambda steps: steps[-1]}


@pytest.fixture
def model(tiny_model):
    """Return a function that gives a tiny model whose tokenizer knows the separator."""

    def get(architecture="qwen2", auto="AutoModelForTokenClassification", n_labels=2):
        folder = tiny_model(architecture, auto=auto, n_labels=n_labels)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(AddedToken("<extra_0>", special=True))
        tokenizer.save_pretrained(folder)
        return folder

    return get


def load(folder, **fields):
    fields = {"kind": "process_reward", "model": "m", "input": TEXT, **fields}
    if "label" not in fields and "tokens" not in fields:
        fields["label"] = 1
    scorer = ProcessReward("s", ["sound"], ProcessRewardConfig(**fields), folder)
    scorer.load("cpu")
    return scorer


def answers(seed=0, n=24):
    rng = np.random.default_rng(seed)
    return [
        Sample((QUESTION,), "\n\n".join(words(rng, rng.integers(1, 4)) for _ in range(k)))
        for k in rng.integers(1, 6, n)
    ]


def steps_of(folder, sample, *, max_length=None, auto="AutoModelForTokenClassification", ids=None):
    """Return P(good) of each step as the model's card computes it: text by text, by token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    text = "how many\n" + "".join(f"{step}<extra_0>" for step in sample.answer.split("\n\n"))
    inputs = tokenizer(text, return_tensors="pt")
    separator = tokenizer.convert_tokens_to_ids("<extra_0>")
    with torch.inference_mode():
        logits = model(**inputs).logits[0]
    logits = logits if ids is None else logits[:, ids]
    good = torch.softmax(logits, dim=-1)[:, 0 if ids is not None else 1]
    return good[inputs["input_ids"][0] == separator].numpy()


@pytest.mark.parametrize("aggregate", REDUCE)
@pytest.mark.parametrize("architecture", ["qwen2", "bert"])
def test_steps_become_one_number(architecture, aggregate, model):
    folder = model(architecture)
    wanted = [one for one in answers() if len(one.answer) < 45]
    scorer = load(folder, aggregate=aggregate)
    steps = [steps_of(folder, one) for one in wanted]
    assert {len(one) for one in steps} >= {1, 2, 3}
    expected = np.array([REDUCE[aggregate](one) for one in steps])
    assert_batches_agree(scorer, wanted, expected)


def test_a_language_model_that_says_good_or_bad(model):
    folder = model("llama", auto="AutoModelForCausalLM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(["+", "-"])
    scorer = load(folder, tokens=["+", "-"], aggregate="mean")
    wanted = answers()
    expected = [
        steps_of(folder, one, auto="AutoModelForCausalLM", ids=ids).mean() for one in wanted
    ]
    assert_batches_agree(scorer, wanted, np.array(expected))


def test_a_separator_that_is_plain_text(tiny_model):
    folder = tiny_model("qwen2", auto="AutoModelForTokenClassification", n_labels=2)
    scorer = load(folder, separator="\n", aggregate="last")
    sample = Sample((QUESTION,), "one\n\ntwo")
    rendered = scorer.render(sample)
    assert rendered.text == "how many\none\ntwo\n"
    (tokens,) = scorer.encode([rendered])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # That of the template is no end of a step.
    assert [tokenizer.decode(tokens.ids[: place + 1]) for place in tokens.marks] == [
        "<s>how many\none\n",
        "<s>how many\none\ntwo\n",
    ]


def test_separators_of_others_are_no_steps(model):
    scorer = load(model())
    plain = Sample((QUESTION,), "one\n\ntwo")
    sly = Sample(
        ({"role": "user", "content": "how<extra_0> many"},), "one<extra_0>\n\n\n\n<extra_0>two"
    )
    assert scorer.render(sly) == scorer.render(plain)


def test_what_is_cut_off_is_not_scored(model):
    scorer = load(model(), max_length=16)
    (tokens,) = scorer.encode([scorer.render(Sample((QUESTION,), "abc\n\ndef\n\n" + "g" * 30))])
    assert len(tokens) == 16
    assert tokens.marks == (4, 8, 15)  # the prompt goes first, the last separator never
    (tokens,) = scorer.encode([scorer.render(Sample((QUESTION,), "g" * 30))])
    assert tokens.marks == (15,)


def test_a_template_that_takes_the_separator_away(tiny_model):
    folder = tiny_model("qwen2", auto="AutoModelForTokenClassification", n_labels=2)
    with pytest.raises(RewardModelError, match="no end of a step is found; set a separator"):
        load(folder, separator="\n", input={"view": "chat"})


def test_an_answer_without_words_is_one_step(model):
    scorer = load(model())
    (tokens,) = scorer.encode([scorer.render(Sample((QUESTION,), "\n\n"))])
    assert len(tokens.marks) == 1


def test_a_single_label_is_a_sigmoid(model):
    folder = model("qwen2", n_labels=1)
    scorer = load(folder, label=None)
    (tokens,) = inputs = scorer.encode([scorer.render(Sample((QUESTION,), "one"))])
    network = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logit = network(input_ids=torch.tensor([tokens.ids])).logits[0, -1, 0]
    np.testing.assert_allclose(scorer.forward(inputs), torch.sigmoid(logit), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"label": None}, "0: LABEL0, 1: LABEL1; set label to that of a good step"),
        ({"label": "GOOD"}, "no label 'GOOD'"),
    ],
)
def test_labels_that_are_not_there(fields, problem, model):
    with pytest.raises(RewardModelError, match=problem):
        load(model(), **fields)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"label": 1, "tokens": ["+", "-"]}, "label and tokens exclude each other"),
        ({"tokens": ["+"]}, "tokens are two"),
        ({"input": {"view": "chat", "question": "good?"}}, "leave question out"),
    ],
)
def test_mistakes_in_the_file(fields, problem):
    fields = {"kind": "process_reward", "model": "m", "input": TEXT, **fields}
    with pytest.raises(ValidationError, match=problem):
        ProcessRewardConfig(**fields)
